"""ONNX to a plan, in small steps: parse, profile, configure, build. No GPU is needed where `target` names one for RTX."""

from __future__ import annotations

import importlib.util
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.extras import install_command
from modiff_trt.core.files import atomic_path
from modiff_trt.engines.onnx_network import OnnxNetwork
from modiff_trt.plugins.modulated_conv.kernels.device_code import check_target
from modiff_trt.plugins.modulated_conv.tensorrt import plugin as trt_plugin
from modiff_trt.plugins.modulated_conv.tensorrt.library import Library, check_parser


@dataclass(frozen=True)
class BuildOptions:
    """Batch sizes of the optimization profile, the tokens of a prompt, the target GPU, and how hard the builder tries.

    `target` is `sm80`, `sm86`, `sm89`, `sm120`, ... for TensorRT-RTX; None is the GPU of this machine. `level` is the builder's
    optimization level, None its own default.
    """

    min_batch: int = 1
    opt_batch: int = 4
    max_batch: int = 16
    tokens: int = 77
    target: str | None = None
    level: int | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise InputError(
                f"--min-batch, --opt-batch and --max-batch must ascend from 1, found {self.min_batch}, {self.opt_batch}, "
                f"{self.max_batch}"
            )
        if self.tokens < 1:
            raise InputError(f"--tokens must be at least 1, found {self.tokens}")
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError(f"--level must lie between 0 and 5, found {self.level}")


@dataclass(frozen=True)
class Built:
    """A serialized plan and the builder's log, from which `report` reads the layers."""

    plan: bytes
    log: tuple[str, ...]


def build_plan(library: Library, network: OnnxNetwork, options: BuildOptions, timing_cache: Path | None = None) -> Built:
    """Builds a strongly typed network. Raises InputError with the builder's own words when it cannot.

    `timing_cache` is read if it is there and written afterwards; TensorRT-RTX, which compiles at load time, has none.
    """
    trt = library.trt
    logger = _collector(trt)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    capability = check_target_name(library, options.target)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    failures: list[str] = []
    if network.plugin:
        check_parser(library)
        failures = trt_plugin.register(trt, check_target(int(target_of(options).removeprefix("sm"))))
    parsed = builder.create_network(0)
    parser = trt.OnnxParser(parsed, logger)
    if not parser.parse(network.data):
        raise InputError(f"TensorRT cannot parse the network: {parser.get_error(0).desc()}")
    if library.is_rtx:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or its streams cannot be captured
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if network.plugin:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if library.is_rtx and (options.level is not None or options.version_compatible):
        raise InputError("--level and --version-compatible are for stock TensorRT; TensorRT-RTX compiles when it loads")
    config.add_optimization_profile(_profile(builder, network, options))
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    cache = None if library.is_rtx else _use_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(parsed, config)
    if plan is None:
        said = failures or [text for severity, text in logger.lines if severity <= trt.ILogger.ERROR]
        raise InputError(f"TensorRT cannot build the network: {said[-1] if said else 'it gives no reason'}")
    if cache is not None and timing_cache is not None:
        with atomic_path(timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return Built(bytes(plan), tuple(text for _, text in logger.lines))


def _collector(trt: Any) -> Any:
    class Collector(trt.ILogger):  # type: ignore[misc]
        """Keeps everything: the final layers are only told in the verbose log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity, text))

    return Collector()


def _profile(builder: Any, network: OnnxNetwork, options: BuildOptions) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in network.inputs.items():
        if shape and shape[0] == -1:
            sizes = (options.min_batch, options.opt_batch, options.max_batch)
            rest = tuple(options.tokens if size == -1 else size for size in shape[1:])
            profile.set_shape(name, *((size, *rest) for size in sizes))
    return profile


def check_target_name(library: Library, target: str | None) -> Any:
    """TensorRT's name of a target's compute capability; None for this machine's GPU. Raises InputError if there is none."""
    if target is None:
        return None
    if not library.is_rtx:
        raise InputError("--target is for TensorRT-RTX; stock TensorRT builds for the GPU of the machine it runs on")
    capability = getattr(library.trt.ComputeCapability, target.upper(), None)
    if capability is None or not target.lower().startswith("sm"):
        known = [name.lower() for name in dir(library.trt.ComputeCapability) if name.startswith("SM")]
        raise InputError(f"--target must be one of {', '.join(known)}, found {shown(target)}")
    return capability


def _use_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    stored = path.read_bytes() if path.exists() else b""
    for content in (stored, b""):  # a damaged one is begun anew
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def target_of(options: BuildOptions) -> str:
    """`sm89`, ...: the target named, or the GPU of this machine. Raises InputError where there is none."""
    if options.target is not None:
        return options.target.lower()
    from modiff_trt.plugins.modulated_conv.kernels.device_code import current_capability

    if importlib.util.find_spec("cuda") is None:
        raise InputError(
            f"to build for this machine's GPU cuda-python is needed: {install_command('cuda')}; or name a --target"
        )
    try:
        return f"sm{current_capability()}"
    except (InputError, ImportError, RuntimeError, OSError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"no NVIDIA GPU is here to build for ({reason}); name one with --target, for TensorRT-RTX") from None
