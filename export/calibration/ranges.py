"""What the inputs of a network's layers do along trajectories in full precision: measured step by step, kept as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.export.calibration.trajectories import Trajectories
from modiff_trt.networks.binding import Binder, on_device
from modiff_trt.networks.operations import LayerSpec, Network
from modiff_trt.networks.quantizers import RangeHistogram
from modiff_trt.networks.torch_ops import Params, float_layer, run_unet

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class InputRanges:
    """What one tensor does along the trajectories: over all chosen steps, and per step."""

    activation: RangeHistogram = field(default_factory=RangeHistogram)
    residual: RangeHistogram = field(default_factory=RangeHistogram)
    activation_max: list[float] = field(default_factory=list)
    residual_max: list[float] = field(default_factory=list)
    activation_min: float = 0.0  # over all steps; 0 where no value is negative

    def begin_step(self) -> None:
        self.activation_max.append(0.0)
        self.residual_max.append(0.0)

    def update(self, value: Tensor, before: Tensor | None) -> None:
        """Takes the tensor at the current step, and at the step before it."""
        self.activation.update(value)
        self.activation_max[-1] = max(self.activation_max[-1], float(value.abs().max()))
        self.activation_min = min(self.activation_min, float(value.min()))
        if before is not None:
            residual = value - before
            self.residual.update(residual)
            self.residual_max[-1] = max(self.residual_max[-1], float(residual.abs().max()))

    def to_arrays(self) -> Arrays:
        return {
            "activation": self.activation.to_array(),
            "residual": self.residual.to_array(),
            "largest": np.asarray([self.activation_max, self.residual_max], np.float64),
            "lowest": np.asarray([self.activation_min], np.float64),
        }

    def take(self, arrays: Mapping[str, np.ndarray[Any, Any]], prefix: str) -> None:
        """Becomes what was kept by `to_arrays` under names with this prefix. Raises KeyError, ValueError."""
        self.activation = RangeHistogram.from_array(arrays[f"{prefix}activation"])
        self.residual = RangeHistogram.from_array(arrays[f"{prefix}residual"])
        self.activation_max, self.residual_max = arrays[f"{prefix}largest"].tolist()
        (self.activation_min,) = arrays[f"{prefix}lowest"].tolist()


@dataclass
class LayerRanges(InputRanges):
    """The ranges of a layer's input; of a concatenated one also for the main half and the skip half."""

    halves: tuple[InputRanges, InputRanges] | None = None
    _patches: list[list[tuple[int, Tensor]]] = field(default_factory=list)

    def begin_step(self) -> None:
        super().begin_step()
        self._patches.append([])

    def see_patches(self, spec: LayerSpec, value: Tensor) -> None:
        """Takes the mean of what each element of the layer's kernel meets at this step, padding included."""
        top, left, bottom, right = spec.padding
        padded, (_, height, width) = F.pad(value, (left, right, top, bottom)), spec.out_shape
        down, across = spec.stride * (height - 1) + 1, spec.stride * (width - 1) + 1
        means = [
            padded[:, :, i : i + down : spec.stride, j : j + across : spec.stride].mean((0, 2, 3), dtype=torch.float64)
            for i in range(spec.kernel)
            for j in range(spec.kernel)
        ]
        self._patches[-1].append((len(value), torch.stack(means, 1).reshape(-1, spec.kernel, spec.kernel).cpu()))

    def to_arrays(self) -> Arrays:
        """Of all steps begun, which must be done. Histograms and maxima are exact, and so is what a step's patches give."""
        found = super().to_arrays()
        for number, half in enumerate(self.halves or ()):
            found |= {f"{number}.{name}": array for name, array in half.to_arrays().items()}
        images = [sum(count for count, _ in parts) for parts in self._patches]
        return found | {"images": np.asarray(images, np.int64), "patches": self.patch_means.numpy()}

    def take(self, arrays: Mapping[str, np.ndarray[Any, Any]], prefix: str) -> None:
        super().take(arrays, prefix)
        for number, half in enumerate(self.halves or ()):
            half.take(arrays, f"{prefix}{number}.")
        means = torch.from_numpy(arrays[f"{prefix}patches"].copy())
        self._patches = [[(count, mean)] for count, mean in zip(arrays[f"{prefix}images"].tolist(), means, strict=True)]

    @property
    def patch_means(self) -> Tensor:
        """float64 [chosen steps, C_in, K, K]: the mean over all images and output pixels."""
        means = []
        for parts in self._patches:
            images = sum(count for count, _ in parts)
            means.append(torch.stack([count / images * mean for count, mean in parts]).sum(0))
        return torch.stack(means)


def measure_ranges(
    network: Network,
    params: Params,
    trajectories: Trajectories,
    batch_size: int,
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda steps, total: steps,
    begun: Mapping[str, LayerRanges] | None = None,
    on_step: Callable[[dict[str, LayerRanges]], None] = lambda ranges: None,
) -> dict[str, LayerRanges]:
    """Runs the float network on each chosen step and its predecessor and records every layer's input.

    The residual of step i is a_i - a_{i-1}; step 0 has none (its residual is recorded as 0 and is not part of the
    histogram). Memory holds the layers' inputs of one batch at two steps. `on_step` sees the ranges after each chosen step.
    With those as `begun` another call goes on from there, to the same result. Raises InputError when an activation is not
    finite.
    """
    device = next(iter(params.values())).device
    binder, context = Binder(network, params), trajectories.context
    position = {int(step): i for i, step in enumerate(trajectories.steps)}
    ranges = dict(begun) if begun is not None else _fresh(network)
    done = len(next(iter(ranges.values())).activation_max)
    chosen = [int(step) for step in trajectories.chosen]
    count = trajectories.x.shape[1]

    for step in progress(iter(chosen[done:]), len(chosen) - done):
        for entry in ranges.values():
            for part in (entry, *(entry.halves or ())):
                part.begin_step()
        for begin in range(0, count, batch_size):
            before: dict[str, Tensor] = {}
            for index in [step - 1, step] if step > 0 else [step]:
                x = torch.from_numpy(trajectories.x[position[index], begin : begin + batch_size]).to(device)
                lines = on_device(context.of(range(begin, begin + len(x))), device)
                x = x.repeat(context.copies, 1, 1, 1)
                t = torch.full((len(x),), trajectories.timesteps[index], device=device)
                recorder = _Recorder(params)
                with torch.no_grad():
                    run_unet(network, params, x, bound=binder(t, binder.hold(lines)), layer=recorder)
                if index == step:
                    for name, value in recorder.inputs.items():
                        if not torch.isfinite(value).all():
                            raise InputError(f"the input of layer '{name}' is not finite at step {step}; check the checkpoint")
                        entry, split = ranges[name], network.layer(name).split
                        entry.update(value, before.get(name))
                        entry.see_patches(network.layer(name), value)
                        for part, channels in zip(entry.halves or (), (slice(0, split), slice(split, None)), strict=False):
                            part.update(value[:, channels], before[name][:, channels] if name in before else None)
                before = recorder.inputs
        on_step(ranges)
    return ranges


def ranges_to_arrays(ranges: Mapping[str, LayerRanges]) -> Arrays:
    """All that is known after a step."""
    return {f"{layer}:{name}": array for layer, entry in ranges.items() for name, array in entry.to_arrays().items()}


def kept_ranges(network: Network, arrays: Arrays) -> dict[str, LayerRanges] | None:
    """What `ranges_to_arrays` made of this network's ranges; None where the arrays are of none, or of another one."""
    ranges = _fresh(network)
    try:
        for layer, entry in ranges.items():
            entry.take(arrays, f"{layer}:")
    except (KeyError, ValueError):
        return None
    return ranges


def _fresh(network: Network) -> dict[str, LayerRanges]:
    return {s.name: LayerRanges(halves=(InputRanges(), InputRanges()) if s.split else None) for s in network.layers}


class _Recorder:
    """The float layer, keeping its inputs."""

    def __init__(self, params: Params) -> None:
        self._layer = float_layer(params)
        self.inputs: dict[str, Tensor] = {}

    def __call__(self, spec: LayerSpec, x: Tensor) -> Tensor:
        self.inputs[spec.name] = x
        return self._layer(spec, x)
