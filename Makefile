# Every target wraps one command; `make -n TARGET` shows it. The variables below are the defaults: the shipped demo
# model. For another one: make sample CONFIG=configs/cifar10.yml CKPT=model-790000.ckpt NAME=cifar10

PYTHON ?= python3
VENV ?= .venv
# What `make setup` was last asked for stays, until it is asked for something else.
-include $(VENV)/.setup.mk
TORCH ?= torch==2.13.*
EXTRAS ?= dev
CONFIG ?= configs/demo.yml
CKPT ?= calib_cache/demo/model.safetensors
NAME ?= my-demo
DEVICE ?= cpu
TIMESTEPS ?= 50
SOLVER ?= ddim
SPACING ?= quad
METHOD ?= modiff
WEIGHT_BIT ?= 8
ACT_BIT ?= 8
PRESET ?= balanced
DTYPE ?= fp32
NUM_SAMPLES ?= 16
SEED ?= 0
OUT ?= out/$(NAME)
RUNTIME ?= auto
TARGET ?=
MIN_BATCH ?= 1
OPT_BATCH ?= 4
MAX_BATCH ?= 16
BACKENDS ?= torch-fp32,native-int8,native-modiff
BATCH_SIZES ?= 1,4
FEATURES ?= fd-cifar
RESULTS ?= $(OUT)/evaluation.json

RUN := $(VENV)/bin/modiff-trt
MODEL := --config $(CONFIG) --ckpt $(CKPT)
# File names carry what decides their content; files of another --ckpt or --config are refused when they are read.
FOLDER := calib_cache/$(NAME)/$(if $(filter-out ddim,$(SOLVER)),$(SOLVER)-)$(SPACING)$(TIMESTEPS)
TRAJECTORIES := $(FOLDER)/trajectories.safetensors
SCALES := $(FOLDER)/$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT).safetensors
ONNX := $(FOLDER)/$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT)-$(DTYPE).onnx

.DEFAULT_GOAL := help
# What setup has not compiled, the first import does; every process would do it again where nothing may be written.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo quantize deploy collect calibrate export engine sample fid bench compare verify report sampler results-tables check test test-gpu lint clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z -]+:.*## /{printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Another choice of packages is another stamp.
STAMP := $(VENV)/.setup-$(shell printf '%s' '$(EXTRAS) $(TORCH)' | cksum | cut -d' ' -f1)

# Python compiles what is imported when it is; all of it beforehand takes as long as installing it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --no-compile "$(TORCH)"
	$(VENV)/bin/pip install --quiet --no-compile --editable ".[$(EXTRAS)]" "$(TORCH)"  # torch again, or torchvision would bring another
	@rm -f $(VENV)/.setup-*
	@printf 'TORCH ?= %s\nEXTRAS ?= %s\n' '$(TORCH)' '$(EXTRAS)' > $(VENV)/.setup.mk
	@touch $@

setup: $(STAMP) ## create .venv and install the project into it

demo: setup ## FP32, Q-Diff and MoDiff from the same noise, with the shipped model
	$(RUN) demo --out out/demo

quantize: setup ## all of it: trajectories, scales, ONNX file and report in OUT
	$(RUN) quantize $(MODEL) --timesteps $(TIMESTEPS) --solver $(SOLVER) --spacing $(SPACING) --preset $(PRESET) \
		--weight-bit $(WEIGHT_BIT) --act-bit $(ACT_BIT) --device $(DEVICE) --out $(OUT)

deploy: setup ## quantize, build an engine (ENGINE=rtx:sm89 needs no GPU) and pack a sampler: OUT and OUT-sampler
	$(RUN) quantize $(MODEL) --timesteps $(TIMESTEPS) --solver $(SOLVER) --spacing $(SPACING) --preset $(PRESET) \
		--weight-bit $(WEIGHT_BIT) --act-bit $(ACT_BIT) --device $(DEVICE) $(if $(ENGINE),--engine $(ENGINE)) --out $(OUT)
	rm -rf $(OUT)-sampler
	$(RUN) package --onnx $(OUT)/network.onnx --out $(OUT)-sampler

collect: setup ## full-precision trajectories for calibration
	$(RUN) collect $(MODEL) --timesteps $(TIMESTEPS) --solver $(SOLVER) --spacing $(SPACING) --device $(DEVICE) --out $(TRAJECTORIES)

$(TRAJECTORIES):
	$(MAKE) collect

calibrate: setup $(TRAJECTORIES) ## scales of every layer
	$(RUN) calibrate $(MODEL) --trajectories $(TRAJECTORIES) --method $(METHOD) --weight-bit $(WEIGHT_BIT) \
		--act-bit $(ACT_BIT) --preset $(PRESET) --device $(DEVICE) --out $(SCALES)

$(SCALES): $(TRAJECTORIES)
	$(MAKE) calibrate

export: setup $(SCALES) ## the QDQ ONNX file
	$(RUN) export $(MODEL) --scales $(SCALES) --dtype $(DTYPE) --out $(ONNX)

$(ONNX): $(SCALES)
	$(MAKE) export

sample: setup $(ONNX) ## images from the ONNX file
	$(RUN) sample --backend onnx --onnx $(ONNX) $(MODEL) --num-samples $(NUM_SAMPLES) --seed $(SEED) --device $(DEVICE) --out $(OUT)

engine: setup ## a TensorRT plan from the ONNX file; RUNTIME=rtx TARGET=sm89 needs no GPU
	$(RUN) build --onnx $(FOLDER)/$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT)-fp16.onnx --runtime $(RUNTIME) $(if $(TARGET),--target $(TARGET)) --dry-run
	$(MAKE) export DTYPE=fp16
	$(RUN) build --onnx $(FOLDER)/$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT)-fp16.onnx --runtime $(RUNTIME) $(if $(TARGET),--target $(TARGET)) \
		--min-batch $(MIN_BATCH) --opt-batch $(OPT_BATCH) --max-batch $(MAX_BATCH) --name $(NAME)-$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT)

bench: setup $(SCALES) ## native INT8 against PyTorch FP32 (on a GPU: DEVICE=cuda BACKENDS=torch-fp16-compiled,native-int8,native-modiff)
	$(RUN) bench $(MODEL) --scales $(SCALES) --device $(DEVICE) --backends $(BACKENDS) --batch-sizes $(BATCH_SIZES) --out $(OUT)/bench.json

sampler: setup $(ONNX) ## a folder that samples by itself, without torch: out/NAME-METHOD-wXaY-sampler/modiff-sampler
	rm -rf out/$(NAME)-$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT)-sampler
	$(RUN) package --onnx $(ONNX) --out out/$(NAME)-$(METHOD)-w$(WEIGHT_BIT)a$(ACT_BIT)-sampler

verify: setup $(SCALES) ## FP16, INT8 and MoDiff engines: built, against onnxruntime, beside PyTorch; one report to post
	$(RUN) engines $(MODEL) --scales $(SCALES) --runtime $(RUNTIME) $(if $(TARGET),--target $(TARGET)) \
		--min-batch $(MIN_BATCH) --max-batch $(MAX_BATCH) --batch-sizes $(BATCH_SIZES) --out $(OUT)/engines

fid: setup ## FID, sFID, IS and FD-CIFAR of OUT: REFERENCE=images FEATURES=fd-cifar,inception
	$(RUN) evaluate --samples $(OUT) $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(SAME_NOISE),--same-noise $(SAME_NOISE)) \
		--features $(FEATURES) --device $(DEVICE) --out $(RESULTS)

compare: setup $(SCALES) ## every backend in one run: PyTorch, native, onnxruntime, and TensorRT with PLANS=a.plan,b.plan
	$(RUN) bench $(MODEL) --scales $(SCALES) --device $(DEVICE) --backends all --batch-sizes $(BATCH_SIZES) \
		$(if $(PLANS),--plans $(PLANS)) --out $(OUT)/compare.json

report: setup $(SCALES) ## one HTML page of what the scales do, with BENCH= and RESULTS= where they exist
	$(RUN) report $(MODEL) --scales $(SCALES) --device $(DEVICE) $(if $(BENCH),--bench $(BENCH)) \
		$(if $(wildcard $(RESULTS)),--evaluation $(RESULTS)) $(if $(PLAN),--plan $(PLAN)) --out $(OUT)/report.html

results-tables: setup ## the tables of the documents, from results/
	for document in README.md docs/results.md docs/robustness.md docs/lab/studies.md docs/lab/solvers.md docs/lab/modes.md docs/lab/kernels.md docs/guide/checkpoints.md docs/guide/README.md docs/lab/tensorrt.md; do $(VENV)/bin/python -m modiff_trt.tools.report.results_tables $$document || exit; done

# Files of tests run beside each other, each process with one thread. Modules' fixtures are made once.
JOBS ?= 2
PYTEST := $(VENV)/bin/pytest -n $(JOBS) --dist loadfile

test: setup ## what CI runs, without a GPU
	$(PYTEST) -m "not gpu"

test-gpu: setup ## the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu

# Of every folder what takes a second or less: a minute in all.
FAST := $(addprefix tests/unit/,core networks runtime/images runtime/backends/test_native_values.py runtime/backends/test_shortcuts_beside.py \
	plugins/test_conv_kernel.py plugins/test_product_kernel.py export/test_calibrate.py export/test_onnx_export.py tools/report \
	tools/bench test_house.py)

check: lint ## the developer's loop: linters and the fast tests
	$(PYTEST) -m "not gpu and not slow" $(FAST)

# In no environment: beside Python's packages they would pass for an installed TensorRT.
STUBS := .typing/stubs/tensorrt_bindings

$(STUBS): | $(STAMP)
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target .typing/stubs "tensorrt-stubs==10.13.*"

lint: setup $(STUBS) ## ruff, mypy, import-linter; calls of TensorRT against the stubs of stock TensorRT
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p .typing/modiff_trt
	for folder in core networks plugins runtime export engines tools configs calib_cache; do ln -sfn ../../$$folder .typing/modiff_trt/$$folder; done
	$(VENV)/bin/mypy --num-workers $(JOBS) $(foreach folder,core networks plugins runtime export engines tools,-p modiff_trt.$(folder))
	$(VENV)/bin/python tests/stock_signatures.py .typing/stubs
	cd .typing && "$(abspath $(VENV))/bin/lint-imports" --config ../pyproject.toml  # from here the folders are portions of one namespace

clean: ## remove outputs, caches and built plans (not calib_cache)
	rm -rf out engines/plans build dist .typing .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
