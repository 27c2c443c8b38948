"""The stages of `quantize --engine`: a float16 file and a TensorRT plan built from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.kinds import Granularity

if TYPE_CHECKING:
    from modiff_trt.core.scales import Scales
    from modiff_trt.engines.build import BuildOptions
    from modiff_trt.plugins.modulated_conv.tensorrt.library import Library

NAME = "network"


@dataclass(frozen=True)
class Engine:
    """A TensorRT that is installed here, and what it is asked to build."""

    library: Library
    options: BuildOptions

    @classmethod
    def of(cls, wanted: str, copies: int) -> Engine:
        """`rtx:sm89`, `rtx`, `tensorrt` or `auto`; without a target, for this machine's GPU. The network sees each image in so
        many `copies`. Raises InputError for what is not installed or cannot be built for."""
        from modiff_trt.engines.build import BuildOptions, check_target_name, target_of
        from modiff_trt.plugins.modulated_conv.tensorrt.library import builder

        runtime, _, target = wanted.partition(":")
        try:
            library, options = builder(runtime), BuildOptions(max_batch=16 * copies, target=target or None)
            check_target_name(library, options.target)
            target_of(options)
        except InputError as error:
            raise InputError(f"--engine {shown(wanted)[1:-1]}: {error}") from None
        return cls(library, options)

    def plan(self, folder: Path) -> Path:
        """Where the plan goes."""
        from modiff_trt.engines.build import target_of
        from modiff_trt.engines.plan_files import plan_path

        return plan_path(folder, NAME, self.library, target=target_of(self.options))

    def build(self, onnx: Path, scales: Scales) -> str:
        """Builds the plan beside the exported file, modulated layers by the plugin where it takes their grids; returns what
        became of the layers."""
        from modiff_trt.engines.onnx_network import load_network
        from modiff_trt.engines.plan_files import build_into

        plugin = bool(scales.modulated) and scales.granularity == Granularity.STATIC
        network = load_network(onnx, plugin)
        _, manifest = build_into(onnx.parent, NAME, self.library, network=network, options=self.options)
        report = manifest["report"]
        if not report["told"]:
            return "the builder does not tell its layers"
        in_int8 = report["quantized_layers_in_int8"] + report["plugin_layers"]
        return f"{report['layers']} layers, {in_int8} of {report['quantized_layers']} quantized ones in INT8"
