"""What the kernels compute, in plain torch and in any float dtype: the specification they are tested against.

A layer is two launches. `rounded_input` forms the layer's input (sum, concatenation, group normalization, SiLU,
upsampling), rounds its difference from `a_hat` to integers and moves `a_hat` by them. `accumulate` adds the integer
product to `o_hat`. `a_hat` is held as integer multiples of a unit, so that no step ever loses what another one added.

Arrays are channels-last: [N, H*W, C].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.moving_grids import shifts_of_phase
from modiff_trt.core.state_grid import STATE_MAX


@dataclass(frozen=True)
class InputShape:
    """The input of a layer: `channels` from the main source, then `skip_channels` of a concatenated one, height and width
    of the sources. With `upsample` the integers are written to 2x2 pixels each, and the state has the sources' size. `frame`
    (top, left, bottom, right) counts the pixels around the integers, which are not written."""

    channels: int
    skip_channels: int
    height: int
    width: int
    upsample: bool = False
    frame: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def total(self) -> int:
        return self.channels + self.skip_channels

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the integers without their frame."""
        factor = 2 if self.upsample else 1
        return factor * self.height, factor * self.width

    @property
    def pitch(self) -> int:
        """Pixels from a row of the integers to the next."""
        return self.out_size[1] + self.frame[1] + self.frame[3]

    @property
    def out_pixels(self) -> int:
        """Those of the integers with their frame."""
        return (self.out_size[0] + self.frame[0] + self.frame[2]) * self.pitch


@dataclass(frozen=True)
class Grid:
    """A pass's grid: `step` = `multiple` * `unit`, and the integers that the bits allow, less the zero point (0 where there is
    state). A `moving` one is shifted by the pass's `phase` (`core.moving_grids`)."""

    step: float
    unit: float
    multiple: int
    low: int
    high: int
    zero_point: int = 0
    moving: bool = False
    phase: int = 0


def layer_input(
    a: Tensor,
    b: Tensor | None = None,
    skip: Tensor | None = None,
    time: Tensor | None = None,
    norm: tuple[Tensor, Tensor, int, float] | None = None,
    silu: bool = False,
    factors: Tensor | None = None,
) -> Tensor:
    """x [N, H*W, C]: a + b, concatenated with skip, plus time [C]; normalized by `norm` (gain [C], shift [C], groups, eps);
    through SiLU; multiplied by `factors` [C]."""
    x = a if b is None else a + b
    if skip is not None:
        x = torch.cat([x, skip], dim=2)
    if time is not None:
        x = x + time
    if norm is not None:
        gain, shift, groups, eps = norm
        x = F.group_norm(x.transpose(1, 2), groups, gain, shift, eps).transpose(1, 2)
    if silu:
        x = F.silu(x)
    if factors is not None:
        x = x * factors
    return x


def upsample(shape: InputShape, x: Tensor) -> Tensor:
    """[N, H*W, C] to nearest neighbours, [N, 4*H*W, C]."""
    image = x.transpose(1, 2).reshape(len(x), -1, shape.height, shape.width)
    return F.interpolate(image, scale_factor=2.0, mode="nearest").flatten(2).transpose(1, 2)


def reachable(x: Tensor, unit: float, multiple: Tensor) -> Tensor:
    """x, clipped to what a state can follow and stay within STATE_MAX, with a step of `multiple` units (a scalar, or for each
    image [N, 1, 1]). Counts are never cut off themselves: o_hat adds up every integer, and would go on without a_hat."""
    reach = unit * (STATE_MAX - multiple.to(x) / 2).clamp(min=0)
    return x.clamp(-reach, reach)


def shifts_of(grid: Grid, x: Tensor) -> Tensor:
    """[C], what x [N, H*W, C] is shifted by, in steps."""
    return torch.from_numpy(shifts_of_phase(grid.phase, x.shape[2])).to(x) if grid.moving else x.new_zeros(x.shape[2])


def rounded_input(x: Tensor, state: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """(q, new state): q = clip(rint((x - unit * state) / step)) and state + multiple * q, with x as `reachable` gives it;
    without state, clip(rint(x / step + shift)) + zero_point."""
    if state is not None:
        x = reachable(x, grid.unit, torch.tensor(grid.multiple)) - grid.unit * state.to(x.dtype)
    q = (x / grid.step + shifts_of(grid, x)).round().clamp(grid.low, grid.high)
    return q + grid.zero_point, None if state is None else state.to(x.dtype) + grid.multiple * q


def accumulate(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    addend: Tensor,
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
) -> Tensor:
    """addend + scale[k] * (weight * q): [N, P*Q, K] from integers q [N, H*W, C] and weight [K, C, R, R].

    `size` is (H, W), `padding` (top, left, bottom, right), `addend` o_hat [N, P*Q, K] or a bias [K].
    """
    top, left, bottom, right = padding
    image = q.transpose(1, 2).reshape(len(q), q.shape[2], *size)
    product = F.conv2d(F.pad(image, (left, right, top, bottom)), weight, stride=stride)
    return addend + scale * product.flatten(2).transpose(1, 2)
