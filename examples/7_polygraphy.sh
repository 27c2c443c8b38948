#!/usr/bin/env bash
# Exported files in the tools that users of TensorRT have. `--inline` writes the file that TensorRT's own parser reads.
#
#     bash examples/7_polygraphy.sh [FOLDER]
#
# Needs `pip install polygraphy`. State comes in as inputs and goes out as outputs: see export/onnx/INTERFACE.md.
set -euo pipefail
OUT=${1:-out/polygraphy}
HERE=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUT"

# 1. The file, without local functions, in full precision for a CPU; for TensorRT add --dtype fp16.
modiff-trt export --config "$HERE/configs/demo.yml" --ckpt "$HERE/calib_cache/demo/model.safetensors" \
    --scales "$HERE/calib_cache/demo/modiff-w8a8.safetensors" --inline --out "$OUT/inlined.onnx"

# 2. What is in it: inputs, outputs, and how many nodes of each kind.
polygraphy inspect model "$OUT/inlined.onnx" --model-type onnx --show layers > "$OUT/layers.txt"

# 3. One pass in onnxruntime on random inputs; the outputs are kept for a comparison.
polygraphy run "$OUT/inlined.onnx" --onnxrt --val-range x:[-1,1] --save-inputs "$OUT/inputs.json" --save-outputs "$OUT/outputs.json"

# 4. On a machine with TensorRT (not run where this is developed): the same inputs through an engine, and its time.
echo "polygraphy run $OUT/inlined.onnx --trt --load-inputs $OUT/inputs.json --load-outputs $OUT/outputs.json --rtol 1e-2 --atol 1e-2"
echo "trtexec --onnx=$OUT/inlined.onnx --stronglyTyped --saveEngine=$OUT/inlined.engine"
