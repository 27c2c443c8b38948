"""Type-checks what calls TensorRT against the stubs of stock TensorRT 10.13 (`tensorrt-stubs`, NVIDIA's names and signatures).

    python tests/stock_signatures.py FOLDER_OF_STUBS

The code takes TensorRT as an argument, since stock TensorRT and TensorRT-RTX share their calls. Here a copy of it takes the
stubs' module instead. What only TensorRT-RTX has is listed, and nothing else may be missing. No stubs of TensorRT 11 exist.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engines/build.py", "plugins/modulated_conv/tensorrt/plugin.py", "runtime/backends/trt_denoiser.py")
# An argument or a name that is a TensorRT, and what stands there in the copy.
CHANGES = (
    (r"^ +trt(: Any)? = library\.trt\n", ""),
    (r"\(trt: Any, ", "("),
    (r"\(trt: Any\)", "()"),
    (r"(_registered|_classes|_collector)\(trt\)", r"\1()"),
    (r"self\._trt\.", "trt."),
    (r"library\.trt\.", "trt."),
    (r"\bbuilder: Any", "builder: trt.Builder"),
    (r"\bconfig: Any", "config: trt.IBuilderConfig"),
    (r"\bengine: Any", "engine: trt.ICudaEngine"),
    (r"  # type: ignore\[misc\]", ""),
)
RTX_ONLY = (
    "num_compute_capabilities",
    "set_compute_capability",
    "ComputeCapability",
    "REQUIRE_USER_ALLOCATION",
    "DynamicShapesKernelSpecializationStrategy",
    "CudaGraphStrategy",
    "dynamic_shapes_kernel_specialization_strategy",
    "cuda_graph_strategy",
)
# What the stubs say more narrowly than the bindings: each was seen to work in the lean runtime 11.4 or in TensorRT-RTX.
NARROW = (
    'Argument 3 of "get_output_shapes"',  # any name and any type, which ours leaves open
    'Signature of "get_aliased_input"',
    'No overload variant of "PluginField"',  # takes numpy arrays, as buffers
    'Return type "int" of "enqueue"',  # the stub has no return type; 0 is success
    'expression has type "PluginFieldCollection"',
    'Argument 2 to "set_shape"',  # takes tuples, as Dims
)
CODES = ("attr-defined", "call-arg", "arg-type", "call-overload", "operator", "index", "assignment", "override")


def copy(source: str) -> str:
    text = (ROOT / source).read_text()
    for pattern, instead in CHANGES:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text.replace(
        "from __future__ import annotations\n", "from __future__ import annotations\nimport tensorrt as trt\n", 1
    )


def mended(stubs: Path, folder: Path) -> Path:
    """A copy of the stubs that Python can read: some arguments are called `in`, and one without a default follows others."""
    shutil.copytree(stubs, folder, dirs_exist_ok=True)
    file = folder / "tensorrt_bindings/tensorrt.pyi"
    file.write_text(re.sub(r"\bin: ", "in_: ", file.read_text()).replace("channel_axis: int)", "channel_axis: int = ...)"))
    return folder


def main(stubs: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        readable = mended(stubs, Path(folder) / "stubs")
        names = []
        for source in SOURCES:
            path = Path(folder) / f"stock_{Path(source).stem}.py"
            path.write_text(copy(source))
            names.append(path.name)
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            os.devnull,
            "--ignore-missing-imports",
            "--check-untyped-defs",
        ]
        command += ["--follow-imports", "silent", *names]
        environment = os.environ | {"MYPYPATH": f"{readable}:{ROOT / '.typing'}"}
        said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in said.stdout.splitlines() if " error: " in line and line.startswith("stock_")]
    if said.returncode not in (0, 1):
        print(said.stdout, said.stderr)
        return 2
    known = RTX_ONLY + NARROW
    unknown = [line for line in lines if any(f"[{code}]" in line for code in CODES) and not any(n in line for n in known)]
    unseen = [name for name in known if not any(name in line for line in lines)]
    for line in unknown:
        print(f"not as in stock TensorRT: {line}")
    for name in unseen:
        print(f"nothing differs in `{name}` any more: take it from the lists")
    print(
        f"{len(SOURCES)} files against stock TensorRT's stubs: {len(unknown)} differences, {len(RTX_ONLY)} names of RTX alone"
    )
    return int(bool(unknown or unseen))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
