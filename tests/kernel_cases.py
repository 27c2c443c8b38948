"""Inputs of the quantize kernel, with odd shapes and every option, and the check against the float64 reference."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from modiff_trt.core.state_grid import STATE_MAX
from modiff_trt.plugins.modulated_conv import reference
from modiff_trt.plugins.modulated_conv.reference import Grid, InputShape


@dataclass(frozen=True)
class KernelCase:
    shape: InputShape
    batch: int = 3
    groups: int = 0
    silu: bool = False
    add: bool = False
    write: bool = False
    time: bool = False
    factors: bool = False
    state: bool = True
    quantize: bool = True
    bits: int = 8
    q_channels: int = 0
    dynamic: bool = False
    far: bool = False
    zero_point: int = 0
    moving: bool = False


CASES = {
    "plain": KernelCase(InputShape(48, 0, 5, 7)),
    "stateless": KernelCase(InputShape(48, 0, 5, 7), state=False),
    # So many images that one element on an edge is no reason to fail.
    "padded image": KernelCase(InputShape(3, 0, 9, 5), batch=9, q_channels=16),
    "sum, written": KernelCase(InputShape(32, 0, 4, 4), add=True, write=True),
    "norm": KernelCase(InputShape(64, 0, 6, 6), groups=32),
    "norm, silu, 4 bits": KernelCase(InputShape(64, 0, 6, 6), groups=32, silu=True, bits=4),
    "norm, time": KernelCase(InputShape(96, 0, 4, 4), groups=32, silu=True, time=True),
    "norm over a concatenation, groups of 12 across the seam": KernelCase(
        InputShape(256, 128, 4, 4), groups=32, silu=True, add=True, write=True, batch=2
    ),
    "norm with skip factors": KernelCase(InputShape(32, 64, 5, 5), groups=32, silu=True, factors=True),
    "norm in several slabs": KernelCase(InputShape(64, 32, 24, 24), groups=32, silu=True, add=True, write=True),
    "norm in slabs, groups of 1": KernelCase(InputShape(32, 0, 13, 11), groups=32, silu=True, time=True),
    "norm in slabs, groups of 6, more slabs than are added at a time": KernelCase(
        InputShape(64, 128, 47, 46), groups=32, silu=True, time=True, batch=2
    ),
    "norm in slabs, groups of 12": KernelCase(InputShape(384, 0, 13, 11), groups=32, silu=True, add=True, write=True, batch=2),
    "norm in slabs, groups of 3": KernelCase(InputShape(96, 0, 13, 11), groups=32, silu=True),
    "norm, 16 groups of 3": KernelCase(InputShape(48, 0, 6, 6), groups=16, silu=True),
    "norm, 16 groups of 8 across the seam": KernelCase(InputShape(80, 48, 5, 7), groups=16, silu=True, time=True),
    "norm in slabs, 16 groups of 5": KernelCase(InputShape(80, 0, 13, 11), groups=16, silu=True, add=True, write=True),
    "norm in slabs across the seam, time": KernelCase(InputShape(256, 128, 17, 9), groups=32, silu=True, time=True, batch=2),
    "norm of a sum that is not needed again": KernelCase(InputShape(64, 0, 10, 10), groups=32, add=True),
    "norm of so many sums that a launch adds them up": KernelCase(
        InputShape(64, 32, 70, 66), groups=32, silu=True, time=True, add=True, write=True, batch=2
    ),
    "norm of 32 groups of 10": KernelCase(InputShape(320, 0, 33, 31), groups=32, silu=True, batch=2, state=False),
    "norm of 32 groups of 10, small, to float": KernelCase(
        InputShape(320, 320, 5, 3), groups=32, silu=True, quantize=False, state=False
    ),
    "norm, stateless": KernelCase(InputShape(64, 0, 8, 8), groups=32, state=False),
    "norm to float": KernelCase(InputShape(64, 0, 8, 8), groups=32, silu=True, quantize=False, state=False),
    "concatenation, raw": KernelCase(InputShape(64, 32, 7, 5), factors=True),
}
CASES["each image its grid"] = KernelCase(InputShape(48, 16, 5, 7), dynamic=True, add=True, write=True)
CASES["each image its grid, norm, 4 bits"] = KernelCase(
    InputShape(64, 0, 9, 9), groups=32, silu=True, time=True, bits=4, dynamic=True, add=True
)
CASES["each image its grid, stateless"] = KernelCase(InputShape(32, 0, 4, 4), groups=32, state=False, dynamic=True)
CASES["beyond what states can count"] = KernelCase(InputShape(48, 0, 5, 7), far=True)
CASES["beyond what states can count, each image its grid"] = KernelCase(InputShape(48, 0, 5, 7), far=True, dynamic=True)
CASES["low zero point, framed"] = KernelCase(InputShape(48, 0, 5, 7, frame=(1, 1, 1, 1)), state=False, zero_point=-96)
CASES["low zero point, norm, silu, 6 bits, framed on two sides, padded channels"] = KernelCase(
    InputShape(64, 32, 13, 11, frame=(0, 0, 1, 1)), groups=32, silu=True, state=False, bits=6, zero_point=-24, q_channels=112
)
CASES["low zero point, upsampled, framed"] = KernelCase(
    InputShape(32, 0, 3, 5, upsample=True, frame=(1, 2, 3, 1)), state=False, bits=3, zero_point=-3
)
CASES["moving grid"] = KernelCase(InputShape(48, 0, 5, 7), state=False, moving=True)
CASES["moving grid across the seam, low zero point, norm in slabs, framed, 6 bits"] = KernelCase(
    InputShape(64, 32, 13, 11, frame=(1, 1, 1, 1)), groups=32, silu=True, state=False, bits=6, zero_point=-24, moving=True
)
CASES["moving grid, small, norm, upsampled, factors"] = KernelCase(
    InputShape(32, 64, 5, 5, upsample=True), groups=32, silu=True, factors=True, state=False, moving=True
)
CASES["upsampled"] = KernelCase(InputShape(64, 0, 4, 2, upsample=True))
CASES["upsampled sum"] = KernelCase(InputShape(32, 0, 3, 5, upsample=True), add=True, write=True)


def grid_of(case: "KernelCase | PixelCase") -> Grid:
    half = 2 ** (case.bits - 1)
    low, high = -half - case.zero_point, half - 1 - case.zero_point
    phase = 41234 if case.moving else 0
    return Grid(5 * 0.003, 0.003, multiple=5, low=low, high=high, zero_point=case.zero_point, moving=case.moving, phase=phase)


def numbers_of(grid: Grid) -> torch.Tensor:
    """float32 [5], as the row vector has them."""
    return torch.tensor([1 / grid.step, grid.unit, grid.multiple, grid.step, grid.phase])


def launch(case: KernelCase, device: str, real: torch.dtype, overlap: bool = False) -> SimpleNamespace:
    """The kernel on fresh random inputs and poisoned outputs: its arguments by name, and `before`, the state as it was."""
    from modiff_trt.plugins.modulated_conv.kernels import quantize as kernel
    from modiff_trt.plugins.modulated_conv.kernels.groups import Norm

    shape, n = case.shape, case.batch

    def random(*size, dtype=torch.float32, factor=1.0):
        return (factor * torch.randn(size)).to(device, dtype)

    # The largest value that a state here can count is 98.
    a = random(n, shape.pixels, shape.channels, dtype=real, factor=100.0 if case.far else 1.0)
    b = random(*a.shape, dtype=real) if case.add else None
    skip = random(n, shape.pixels, shape.skip_channels, dtype=real) if shape.skip_channels else None
    time = random(shape.total) if case.time else None
    factors = 1 + 0.5 * torch.rand(shape.total).to(device) if case.factors else None
    norm = (1 + random(shape.total, factor=0.1), random(shape.total, factor=0.1), case.groups, 1e-6) if case.groups else None
    total = torch.full_like(a, float("nan")) if case.write else None
    grid = grid_of(case)
    furthest = STATE_MAX if case.far else 900
    state = torch.randint(-furthest, furthest + 1, (n, shape.pixels, shape.total), dtype=torch.int16, device=device)
    state = state if case.state else None
    if case.quantize:
        out = torch.full((n, shape.out_pixels, case.q_channels or shape.total), 77, dtype=torch.int8, device=device)
    else:
        out = torch.full((n, shape.pixels, shape.total), float("nan"), dtype=real, device=device)
    before = state.clone() if state is not None else None
    steps = torch.full((n,), float("nan"), device=device) if case.dynamic else None
    sources = {"b": b, "total": total, "skip": skip, "time": time, "factors": factors, "state": state, "steps": steps}
    kernel.quantize_input(
        shape,
        a,
        out,
        norm=Norm(*norm) if norm else None,
        silu=case.silu,
        grid=numbers_of(grid).to(device) if case.quantize else None,
        bits=case.bits,
        zero_point=case.zero_point,
        moving=case.moving,
        overlap=overlap,
        **sources,
    )
    return SimpleNamespace(**sources, a=a, out=out, norm=norm, grid=grid, before=before)


def check(case: KernelCase, device: str, overlap: bool = False) -> None:
    """Integers may differ only where the float64 value lies on an edge."""
    real = torch.float16 if device == "cuda" else torch.float32
    shape, n, made = case.shape, case.batch, launch(case, device, real, overlap)
    out, norm, grid, before, state, steps = made.out, made.norm, made.grid, made.before, made.state, made.steps

    def wide(x):
        return None if x is None else x.double()

    total, a64, b64 = made.total, wide(made.a), wide(made.b)
    if case.write:
        # the sum is stored in the network's type, and that is what the layer sees
        torch.testing.assert_close(total, (a64 + b64).to(real), rtol=1e-3, atol=1e-3)
        a64, b64 = total.double(), None
    elif case.add:
        a64, b64 = (a64 + b64).to(real).double(), None
    norm64 = (wide(norm[0]), wide(norm[1]), norm[2], norm[3]) if norm else None
    x = reference.layer_input(a64, b64, wide(made.skip), wide(made.time), norm64, case.silu, wide(made.factors))
    if not case.quantize:
        torch.testing.assert_close(out.double(), x, rtol=2e-3, atol=2e-3)
        return

    def residual(multiple):
        return x if before is None else reference.reachable(x, grid.unit, multiple) - grid.unit * before.double()

    step, multiple = torch.tensor(grid.step, dtype=torch.float64), torch.tensor(grid.multiple)
    if steps is not None:
        # The grid spans the image's largest magnitude; where there is state, in the next whole number of units.
        span = residual(torch.tensor(0)).abs().amax((1, 2), keepdim=True) / grid.high
        step, multiple = steps.double()[:, None, None], (steps.double()[:, None, None] / grid.unit).round()
        if before is None:
            torch.testing.assert_close(step, span, rtol=1e-5, atol=0)
        else:
            torch.testing.assert_close(step, multiple * grid.unit, rtol=1e-6, atol=0)
            assert ((step >= span * (1 - 1e-4)) & (step < span + grid.unit * 1.01)).all()
    shifts = reference.shifts_of(grid, x)
    q = (residual(multiple) / step + shifts).round().clamp(grid.low, grid.high)
    if steps is None:
        assert torch.equal(q + grid.zero_point, reference.rounded_input(x, wide(before), grid)[0])
    (height, width), (above, left, below, right) = shape.out_size, shape.frame
    framed = out.view(n, above + height + below, left + width + right, -1)
    inner = framed[:, above : above + height, left : left + width]
    out = inner.reshape(n, height * width, -1).clone()
    inner.fill_(77)
    assert (framed == 77).all()  # the frame is not touched
    if shape.upsample:
        found = out.view(n, shape.height, 2, shape.width, 2, -1)
        assert (found == found[:, :, :1, :, :1]).all()  # each value four times
        out = found[:, :, 0, :, 0].reshape(n, shape.pixels, -1)
    position = (residual(multiple) / step + shifts).clamp(grid.low, grid.high)
    found = out[:, :, : shape.total].double() - grid.zero_point
    assert (out[:, :, shape.total :] == 77).all()  # padding channels are not touched
    assert float((found - position).abs().max()) < 0.5 + 2e-3
    assert float((found != q).float().mean()) < 2e-3
    if state is not None:
        assert torch.equal(state.double(), before.double() + multiple * found)
        assert float(state.abs().max()) <= STATE_MAX


@dataclass(frozen=True)
class PixelCase:
    """A layer norm of `channels`, or GEGLU that leaves them; N images of `pixels`."""

    channels: int
    pixels: int
    gated: bool = False
    batch: int = 3
    add: bool = False
    state: bool = True
    quantize: bool = True
    bits: int = 8
    q_channels: int = 0
    offset: float = 0.0
    zero_point: int = 0
    moving: bool = False


PIXEL_CASES = {
    "layer norm": PixelCase(320, 35),
    "layer norm of a sum": PixelCase(48, 21, add=True),
    "layer norm, far from zero": PixelCase(320, 35, offset=30.0),
    "layer norm, stateless, 4 bits": PixelCase(96, 17, state=False, bits=4),
    "layer norm to float": PixelCase(100, 9, state=False, quantize=False, add=True),
    "layer norm, padded": PixelCase(40, 33, q_channels=48),
    "layer norm of 1280": PixelCase(1280, 5, add=True),
    "geglu": PixelCase(192, 35, gated=True),
    "geglu, stateless, padded": PixelCase(72, 13, gated=True, state=False, q_channels=80),
    "layer norm, low zero point": PixelCase(96, 17, state=False, zero_point=-96),
    "geglu, low zero point, 6 bits, padded": PixelCase(72, 13, gated=True, state=False, bits=6, zero_point=-24, q_channels=80),
    "layer norm, moving grid": PixelCase(96, 17, state=False, moving=True),
    "geglu, moving grid, low zero point": PixelCase(5120, 3, gated=True, batch=2, state=False, zero_point=-96, moving=True),
    "geglu to float": PixelCase(160, 19, gated=True, state=False, quantize=False),
    "geglu of 5120": PixelCase(5120, 3, gated=True, batch=2, bits=6),
}


def launch_pixels(case: PixelCase, device: str, real: torch.dtype, overlap: bool = False) -> SimpleNamespace:
    """`pixels.quantize_pixels` on fresh random inputs and poisoned outputs: what it was given, and `before`, the state."""
    from modiff_trt.plugins.modulated_conv.kernels.pixels import quantize_pixels

    n, pixels, c = case.batch, case.pixels, case.channels
    a = (case.offset + torch.randn(n, pixels, 2 * c if case.gated else c)).to(device, real)
    b = torch.randn_like(a) if case.add else None
    total = torch.full_like(a, float("nan")) if case.add else None
    norm = None if case.gated else ((1 + 0.1 * torch.randn(c)).to(device), (0.1 * torch.randn(c)).to(device), 1e-5)
    grid = grid_of(case)
    state = torch.randint(-900, 901, (n, pixels, c), dtype=torch.int16, device=device) if case.state else None
    before = state.clone() if state is not None else None
    if case.quantize:
        out = torch.full((n, pixels, case.q_channels or c), 77, dtype=torch.int8, device=device)
    else:
        out = torch.full((n, pixels, c), float("nan"), dtype=real, device=device)
    numbers = numbers_of(grid).to(device) if case.quantize else None
    sources = {"b": b, "total": total, "layer_norm": norm, "state": state}
    of_grid = {"bits": case.bits, "zero_point": case.zero_point, "moving": case.moving}
    quantize_pixels(a, out, grid=numbers, **of_grid, overlap=overlap, **sources)
    return SimpleNamespace(**sources, a=a, out=out, grid=grid, before=before)


def check_pixels(case: PixelCase, device: str, overlap: bool = False) -> None:
    """The kernel against float64; integers may differ only where the float64 value lies on an edge."""
    real = torch.float16 if device == "cuda" else torch.float32
    made, c = launch_pixels(case, device, real, overlap), case.channels
    source = made.a.double()
    if case.add:
        torch.testing.assert_close(made.total, (source + made.b.double()).to(real), rtol=1e-3, atol=1e-3)
        source = made.total.double()
    if case.gated:
        value, gate = source.chunk(2, dim=2)
        x = value * torch.nn.functional.gelu(gate)
    else:
        gain, shift, eps = made.layer_norm
        x = torch.nn.functional.layer_norm(source, (c,), gain.double(), shift.double(), eps)
    if not case.quantize:
        torch.testing.assert_close(made.out.double(), x, rtol=2e-3, atol=2e-3)
        return
    residual = x if made.before is None else x - made.grid.unit * made.before.double()
    position = (residual / made.grid.step + reference.shifts_of(made.grid, x)).clamp(made.grid.low, made.grid.high)
    found = made.out[:, :, :c].double() - made.grid.zero_point
    assert (made.out[:, :, c:] == 77).all()
    assert float((found - position).abs().max()) < 0.5 + 2e-3
    assert float((found != position.round()).float().mean()) < 2e-3
    assert position.abs().mean() > 1  # the case has something to round
    if made.state is not None:
        assert torch.equal(made.state.double(), made.before.double() + made.grid.multiple * found)
