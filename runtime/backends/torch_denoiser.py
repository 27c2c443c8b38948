"""The `torch` backend (FP32 reference) and `torch-sim` (simulated quantization, any bits)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff_trt.core.context import Arrays, checked, context_arrays
from modiff_trt.core.kinds import Granularity
from modiff_trt.core.rows import RowTable, plain_rows
from modiff_trt.core.scales import Scales
from modiff_trt.networks.binding import Binder, Held, on_device
from modiff_trt.networks.modulated import (
    OnLayer,
    QuantizedLayer,
    State,
    initial_state,
    moving_shifts,
    quantize_layers,
    simulate,
)
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Bound, Params, run_unet
from modiff_trt.runtime.denoiser import StateInfo

# A study may change the state before the pass of a row: (row, layers, state) -> state.
BetweenPasses = Callable[[int, Mapping[str, QuantizedLayer], State], State]


@contextmanager
def full_precision(*, integer_products: bool = False) -> Iterator[None]:
    """FP32 without TF32 while it lasts; convolutions through TF32 all the same where they are of small integers alone."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, integer_products
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class _TorchBase:
    """Moves arrays, and looks time biases up in the folded table."""

    def __init__(self, network: Network, params: Params, rows: RowTable, device: str, dtype: torch.dtype) -> None:
        self._network = network
        self._device = torch.device(device)
        self._dtype = dtype
        self._params = {k: p.to(self._device, dtype) for k, p in params.items()}
        with full_precision():
            self._binder = Binder(network, {k: p.to(self._device) for k, p in params.items()}, dtype)
        self._held = Held({}, None)
        self._rows = rows

    @property
    def rows(self) -> RowTable:
        return self._rows

    def from_host(self, x: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self._device, self._dtype)

    def to_host(self, x: Tensor) -> np.ndarray[Any, Any]:
        return x.float().cpu().numpy()

    def _condition(self, context: Arrays | None) -> None:
        """Computes what does not change during a trajectory."""
        if context_arrays(self._network.config.architecture):
            with full_precision():
                self._held = self._binder.hold(on_device(checked(context), self._device))

    def _bound(self, row: int) -> Bound:
        t = int(self._rows.t[row])
        with full_precision():
            return self._binder(slice(t, t + 1), self._held)


class TorchDenoiser(_TorchBase):
    """The network as trained, in FP32 (or float64, for references)."""

    def __init__(
        self,
        network: Network,
        params: Params,
        timesteps: tuple[int, ...],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(network, params, plain_rows(timesteps), device, dtype)

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        return ()

    def reset(self, batch: int, context: Arrays | None = None) -> None:
        """Nothing of an image is kept between passes."""
        self._condition(context)

    @torch.no_grad()
    def __call__(self, x: Tensor, row: int) -> Tensor:
        with full_precision():
            return run_unet(self._network, self._params, x, bound=self._bound(row))


class SimDenoiser(_TorchBase):
    """Simulated quantization by a scales file; the arithmetic of the modulated layer in floating point.

    On a GPU, products of integers go through TF32, which holds integers up to 2048 exactly; everything else is float32.
    """

    def __init__(
        self,
        network: Network,
        params: Params,
        scales: Scales,
        device: str = "cpu",
        *,
        act_quant: bool | Collection[str] = True,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        on_layer: OnLayer | None = None,
        between_passes: BetweenPasses | None = None,
    ) -> None:
        """`act_quant` off leaves activations exact; names, of layers without state, leave it on for those alone. `compiled`
        runs a pass through torch.compile (a minute or two to begin with). Calibration watches layers through `on_layer`; see
        `simulate`. `between_passes` is called before every pass but a trajectory's first."""
        if not isinstance(act_quant, bool) and scales.modulated:
            raise ValueError("single layers are quantized by scales without state")
        super().__init__(network, params, scales.rows if act_quant else plain_rows(scales.rows.timesteps), device, dtype)
        self.layers: dict[str, QuantizedLayer] = quantize_layers(network, self._params, scales, dtype=dtype)
        shifts = moving_shifts(network, scales)
        self._shifts = shifts.to(self._device, dtype) if shifts is not None and act_quant else None
        self._modulated = scales.modulated if act_quant else ()
        self._act_quant = act_quant
        self._pass = torch.compile(simulate) if compiled else simulate
        # Only integers are convolved where every layer is quantized on a static grid.
        every_layer = act_quant is True and len(self.layers) == len(network.layers)
        self._only_integers = every_layer and scales.granularity == Granularity.STATIC
        self._on_layer, self._between_passes = on_layer, between_passes
        self._state: State = {}

    @property
    def state(self) -> State:
        """a_hat and o_hat of every modulated layer after the last pass."""
        return self._state

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        size = torch.finfo(self._dtype).bits // 8
        shapes = []
        for name in self._modulated:
            spec = self._network.layer(name)
            shapes += [(f"a_hat.{name}", spec.in_shape), (f"o_hat.{name}", spec.out_shape)]
        return tuple(StateInfo(name, shape, int(np.prod(shape)) * size) for name, shape in shapes)

    def reset(self, batch: int, context: Arrays | None = None) -> None:
        self._condition(context)
        with full_precision():
            self._state = {name: initial_state(self.layers[name], batch) for name in self._modulated}

    @torch.no_grad()
    def __call__(self, x: Tensor, row: int) -> Tensor:
        exact = self._rows.exact_start and row == 0
        if self._between_passes is not None and row > 0:
            self._state = self._between_passes(row, self.layers, self._state)
        factors = torch.from_numpy(self._rows.multipliers[row]).to(self._device, self._dtype) if self._modulated else ()
        multipliers = dict(zip(self._modulated, factors, strict=True))
        with full_precision(integer_products=self._only_integers and not exact):
            eps, self._state = self._pass(
                self._network,
                self._params,
                self.layers,
                self._state,
                x,
                self._bound(row),
                multipliers,
                exact=exact,
                act_quant=self._act_quant,
                shifts=self._shifts[row] if self._shifts is not None else None,
                on_layer=self._on_layer,
            )
        return eps
