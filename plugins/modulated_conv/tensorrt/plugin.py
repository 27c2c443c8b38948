"""TensorRT's plugin for the whole modulated layer: two launches, with `a_hat` and `o_hat` updated where they stand.

    o_hat', a_hat' = ModulatedConv(x, a_hat, o_hat, m, scale, weight, weight_scale)

x, a_hat [N, C, H, W] and o_hat [N, K, P, Q] are float16 or float32 and linear: the state is an input and an output of the
engine, so that any other order would make TensorRT copy it. m and scale are one number each; weight is int8 [K, R, R, C'] with
C' = C padded to 32; weight_scale [K]. It is a V3 plugin in Python: `enqueue` runs on the host while a step is captured, and not
when its CUDA graph is replayed. The kernels are machine code that the plan carries, so that running it needs cuda-python and
this module, and neither torch nor Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from modiff_trt.core.manifest import CONV_ATTRIBUTES, DOMAIN, FUNCTION, PLUGIN_VERSION
from modiff_trt.plugins.modulated_conv.geometry import RESIDUAL_TILE, Geometry, Variant, conv_variant, residual_variant
from modiff_trt.plugins.modulated_conv.kernels.device_code import (
    FLOAT,
    INT,
    POINTER,
    DeviceCode,
    compile_variant,
    launch,
    load,
    pack,
    unpack,
)

X, A_HAT, O_HAT, MULTIPLIER, SCALE, WEIGHT, WEIGHT_SCALE = range(7)
# An output's index to the input whose memory it is.
ALIASED = {0: O_HAT, 1: A_HAT}
FIELDS = (*CONV_ATTRIBUTES, "grid")
KERNELS = "kernels"


def register(trt: Any, capability: int | None = None) -> list[str]:
    """Makes the plugin known to an imported TensorRT. `capability` (89 is 8.9) is that of the GPU that engines built from now
    on are for; it is not needed to run one. Returns the list that will say why layers of the build that follows failed."""
    creator = _registered(trt)
    creator.capability, creator.failures = capability, []
    failures: list[str] = creator.failures
    return failures


@functools.cache
def _registered(trt: Any) -> Any:
    """The creator in TensorRT's own registry, which holds one of a name for the whole process."""
    creator = _classes(trt)[1]()
    trt.get_plugin_registry().register_creator(creator, DOMAIN)
    return creator


def _classes(trt: Any) -> tuple[Any, Any]:
    """(plugin, creator): their base classes are those of the TensorRT in use."""
    reals = {trt.float16: "fp16", trt.float32: "fp32"}

    class ModulatedConv(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """One layer. `attributes` (FIELDS) come from the network's node, `codes` from the compiler or from the plan."""

        def __init__(
            self,
            attributes: dict[str, list[int]],
            capability: int | None,
            codes: dict[Variant, DeviceCode],
            failures: list[str],
        ) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace, self.num_outputs = FUNCTION, PLUGIN_VERSION, DOMAIN, 2
            self.attributes, self.capability, self.codes, self.failures = attributes, capability, codes, failures
            self._fields: list[Any] = []

        # Building

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = ModulatedConv(self.attributes, self.capability, self.codes, failures=self.failures)
            copy.__dict__.update(self.__dict__)
            return copy

        def get_output_data_types(self, inputs: Any) -> Any:
            return [inputs[O_HAT], inputs[A_HAT]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            return [trt.DimsExprs(inputs[O_HAT]), trt.DimsExprs(inputs[A_HAT])]

        def get_aliased_input(self, output: int) -> int:
            return ALIASED[output]

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            tensor, x = tensors[position].desc, tensors[X].desc
            kind = tensor.type == (trt.int8 if position == WEIGHT else x.type)
            return bool(kind and x.type in reals and tensor.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            """Compiles what the profile's batch sizes need."""
            try:
                self._compile(inputs)
            except Exception as error:  # TensorRT only passes on that something failed
                self.failures.append(str(error))
                raise

        def _compile(self, inputs: Any) -> None:
            if self.capability is None:
                return
            real = reals[inputs[X].desc.type]
            shape, out = list(inputs[X].desc.dims), list(inputs[O_HAT].desc.dims)
            least, most = int(inputs[X].min[0]), int(inputs[X].max[0])
            # The tile changes at a few sizes only: those of powers of two show which.
            sizes = {least, most, *(1 << i for i in range(most.bit_length()) if least <= 1 << i <= most)}
            needed = {residual_variant(real)}
            needed |= {conv_variant(self._geometry([n, *shape[1:]], out), real) for n in sizes}
            self.codes = {variant: compile_variant(variant, self.capability) for variant in needed}

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return self._geometry(list(inputs[X].max), list(inputs[O_HAT].max)).integer_bytes

        def get_valid_tactics(self) -> Any:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one way to run it."""

        def get_fields_to_serialize(self) -> Any:
            self._fields = [
                trt.PluginField(name, np.asarray(self.attributes[name], np.int64), trt.PluginFieldType.INT64) for name in FIELDS
            ]
            packed = np.frombuffer(pack(self.codes), np.int8)
            self._fields.append(trt.PluginField(KERNELS, packed, trt.PluginFieldType.INT8))
            return trt.PluginFieldCollection(self._fields)

        # Running

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Loads the kernels, so that `enqueue` loads nothing."""
            for code in self._choose(inputs)[1:]:
                load(code)

        def enqueue(self, inputs: Any, outputs: Any, sources: Any, results: Any, workspace: int, stream: int) -> int:
            geometry, residual, conv = self._choose(inputs)
            low, high = self.attributes["grid"]
            pixels, lanes, _ = RESIDUAL_TILE
            grid = (-(-geometry.pixels // pixels), -(-geometry.padded // lanes), geometry.batch)
            launch(
                residual,
                grid,
                stream,
                (
                    *(sources[X], sources[A_HAT], results[1], sources[SCALE], sources[MULTIPLIER], workspace),
                    *(geometry.pixels, geometry.channels, geometry.padded, float(low), float(high)),
                ),
                (*[POINTER] * 6, *[INT] * 3, *[FLOAT] * 2),
            )
            rows, columns = self._conv(inputs, geometry).tile[:2]
            launch(
                conv,
                (-(-geometry.sites // rows), -(-geometry.out_channels // columns), 1),
                stream,
                (
                    *(workspace, workspace, sources[WEIGHT], sources[WEIGHT_SCALE], sources[O_HAT], results[0]),
                    *(sources[SCALE], sources[MULTIPLIER], 0, 0, geometry.sites),
                ),
                (*[POINTER] * 10, INT),
            )
            return 0

        def _geometry(self, x: list[int], o_hat: list[int]) -> Geometry:
            top, left, bottom, right = self.attributes["pads"]
            kernel, stride = self.attributes["kernel_shape"][0], self.attributes["strides"][0]
            return Geometry(
                x[0],
                x[1],
                x[2],
                width=x[3],
                out_channels=o_hat[1],
                kernel=kernel,
                stride=stride,
                padding=(top, left, bottom, right),
            )

        def _conv(self, inputs: Any, geometry: Geometry) -> Variant:
            return conv_variant(geometry, reals[inputs[X].type])

        def _choose(self, inputs: Any) -> tuple[Geometry, DeviceCode, DeviceCode]:
            geometry = self._geometry(list(inputs[X].dims), list(inputs[O_HAT].dims))
            conv = self._conv(inputs, geometry)
            return geometry, self.codes[residual_variant(conv.real)], self.codes[conv]

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes a layer from the network's node, or from a plan."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = FUNCTION, DOMAIN, PLUGIN_VERSION
            none = np.zeros(0, np.int64)
            self._fields = [trt.PluginField(name, none, trt.PluginFieldType.INT64) for name in FIELDS]
            self._fields.append(trt.PluginField(KERNELS, np.zeros(0, np.int8), trt.PluginFieldType.INT8))
            self.field_names = trt.PluginFieldCollection(self._fields)
            self.capability: int | None = None
            self.failures: list[str] = []

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {field.name: np.asarray(field.data) for field in fields}
            attributes = {key: found[key].astype(np.int64).ravel().tolist() for key in FIELDS}
            codes = unpack(found[KERNELS].astype(np.int8).tobytes()) if KERNELS in found and found[KERNELS].size else {}
            capability = self.capability if phase == trt.TensorRTPhase.BUILD else None
            return ModulatedConv(attributes, capability, codes, failures=self.failures)

    return ModulatedConv, Creator
