"""The plugin's kernels as machine code: compiled when an engine is built, carried inside the plan, launched without torch.

Compiling needs Triton and no GPU. Loading and launching needs cuda-python alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modiff_trt.core.errors import InputError
from modiff_trt.plugins.modulated_conv.geometry import Variant

# Compute capabilities with INT8 tensor cores that the kernels are written for.
OLDEST = 80
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
MOST_SHARED = 48 * 1024
# Of two 16-bit halves; ptxas 12.8, 12.9 and 13.0 have been seen to drop the constant of such an addition.
PACKED = "add.s16x2"
# What stands beside the machine code in a plan.
FIELDS = ("entry", "threads", "shared", "scratch")


@dataclass(frozen=True)
class DeviceCode:
    """Machine code of one kernel: its entry point, threads a block, bytes of shared memory, and how many pointers to scratch
    memory it takes behind its own arguments (Triton's versions differ; these kernels use none of it)."""

    entry: str
    threads: int
    shared: int
    scratch: int
    code: bytes


def check_target(capability: int) -> int:
    """The compute capability, if kernels can be compiled for it here; otherwise raises InputError."""
    if capability < OLDEST:
        raise InputError(f"the plugin needs compute capability 8.0 or later, found {capability // 10}.{capability % 10}")
    if importlib.util.find_spec("triton") is None:
        raise InputError("building with the plugin needs Triton: pip install triton; or build with --no-plugin")
    return capability


@functools.cache  # layers of one network share most kernels
def compile_variant(variant: Variant, capability: int) -> DeviceCode:
    """Compiles for a compute capability (89 is 8.9). Raises InputError where that or Triton is not to be had."""
    check_target(capability)
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from modiff_trt.plugins.modulated_conv.kernels.conv import conv_kernel
    from modiff_trt.plugins.modulated_conv.kernels.residual import residual_kernel

    first, second, *rest, warps = variant.tile
    constants: dict[str, Any] = {}
    real = f"*{variant.real}"
    if variant.kind == "residual":
        function, pointers = residual_kernel, [real] * 5 + ["*i8"]
        numbers = ["i32"] * 3 + ["fp32"] * 2
        constants |= {"BLOCK_P": first, "BLOCK_C": second}
    else:
        function, pointers = conv_kernel, ["*i8", "*i8", "*i8", *[real] * 5, "*i32", "*i32"]
        numbers = ["i32"]
        constants |= dict(variant.constants) | {
            "C2": 0,
            "INTEGER": True,
            "BIAS": False,
            "STEP": 1,
            "CHANNELS_FIRST": True,
            "SPLIT": 1,
            "OVERLAP": False,
        }
        constants |= {"BLOCK_M": first, "BLOCK_N": second, "BLOCK_K": rest[0], "STAGES": rest[1]}
    names = function.arg_names
    types = [*pointers, *numbers, *["constexpr"] * len(constants)]
    # Tensors and workspaces begin at aligned addresses, single numbers anywhere; integer channels are padded to 32.
    anywhere = ("step_ptr", "multiplier_ptr", "partial_ptr", "arrived_ptr")
    aligned = [i for i, n in enumerate(names) if (n.endswith("_ptr") and n not in anywhere) or n == "padded"]
    source = ASTSource(
        fn=function,
        signature=dict(zip(names, types, strict=True)),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # three quarters of the machine code's size
        built = compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": True}
        )
    check_ptx(built.asm["ptx"], variant.name)
    parameters = len(set(re.findall(rf"{built.metadata.name}_param_\d+", built.asm["ptx"])))
    scratch = parameters - len(pointers) - len(numbers)
    about = built.metadata
    return DeviceCode(about.name, about.num_warps * 32, about.shared, scratch, built.asm["cubin"])


def check_ptx(ptx: str, name: str) -> None:
    """Raises RuntimeError for code with packed 16-bit additions, which ptxas may assemble wrongly."""
    if PACKED in ptx:
        raise RuntimeError(f"the kernel {name} was compiled to packed 16-bit arithmetic, which ptxas gets wrong")


def pack(codes: dict[Variant, DeviceCode]) -> bytes:
    """A zip archive of kernels, the same bytes for the same kernels."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for variant, code in sorted(codes.items(), key=lambda item: item[0].name):
            about = {"variant": asdict(variant)} | {name: getattr(code, name) for name in FIELDS}
            for suffix, data in ((".json", json.dumps(about).encode()), (".cubin", code.code)):
                archive.writestr(zipfile.ZipInfo(variant.name + suffix), data, zipfile.ZIP_DEFLATED)
    return content.getvalue()


def unpack(content: bytes) -> dict[Variant, DeviceCode]:
    """The kernels of `pack`."""
    codes = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            if not name.endswith(".json"):
                continue
            about = json.loads(archive.read(name))
            said = about["variant"]
            constants = tuple((key, value) for key, value in said["constants"])
            variant = Variant(said["kind"], said["real"], constants, tuple(said["tile"]))
            code = archive.read(name.removesuffix(".json") + ".cubin")
            codes[variant] = DeviceCode(**{field: about[field] for field in FIELDS}, code=code)
    return codes


@functools.cache
def load(code: DeviceCode) -> Any:
    """The kernel on the current device, a driver function handle. It stays loaded until the process ends."""
    from cuda.bindings import driver

    module = check(driver.cuModuleLoadData(code.code))
    function = check(driver.cuModuleGetFunction(module, code.entry.encode()))
    if code.shared > MOST_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, attribute, code.shared))
    return function


def launch(code: DeviceCode, grid: tuple[int, int, int], stream: int, values: Sequence[Any], types: Iterable[Any]) -> None:
    """Enqueues a kernel. Allocates nothing on the device, synchronizes nothing, and is legal under graph capture."""
    from cuda.bindings import driver

    arguments = ((*values, *[0] * code.scratch), (*types, *[POINTER] * code.scratch))
    check(driver.cuLaunchKernel(load(code), *grid, code.threads, 1, 1, code.shared, stream, arguments, 0))


def current_capability(index: int = 0) -> int:
    """Compute capability (89 is 8.9) of a GPU. Raises InputError, or what cuda-python raises without a driver."""
    from cuda.bindings import driver

    check(driver.cuInit(0))
    device, names = check(driver.cuDeviceGet(index)), driver.CUdevice_attribute
    major = check(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = check(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return 10 * int(major) + int(minor)


def check(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-python call. Raises InputError with the driver's own name for what went wrong."""
    error, *values = result
    if int(error) != 0:
        raise InputError(f"the CUDA driver reports {getattr(error, 'name', error)}")
    return values[0] if values else None
