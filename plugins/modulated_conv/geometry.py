"""Shapes of a modulated convolution, and which kernels serve it. No torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modiff_trt.core.errors import InputError

# Integer inputs and weights are padded to a multiple of so many channels.
CHANNELS = 32
# Of the plugin's first launch: pixels and channels of a program, and its warps.
RESIDUAL_TILE = (64, 64, 4)
# With fewer programs than this a GPU is mostly empty; sums are split until they are about as many.
FULL = 100
MOST_TILES = 4096
# Steps of a sum from which a program is long.
LONG = 36
# Images of at most so many pixels are normalized in one launch.
SMALL = 64
# Taps times channels up to which a layer in float is at a network's edge (`kernels.edges`).
MOST_OF_AN_EDGE = 64


@dataclass(frozen=True)
class Variant:
    """What a kernel is specialized for. `kind` is `residual`, with the tile (pixels, channels, warps), or `conv`, with (sites,
    channels, depth, stages, warps) and the constants of its geometry."""

    kind: str
    real: str
    constants: tuple[tuple[str, int], ...]
    tile: tuple[int, ...]

    @property
    def name(self) -> str:
        return "-".join([self.kind, self.real, *(str(value) for _, value in self.constants), *map(str, self.tile)])


@dataclass(frozen=True)
class Geometry:
    """A convolution of N images: input [C, H, W], output channels, kernel size, stride, padding (top, left, bottom, right)."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    padding: tuple[int, int, int, int]

    @property
    def padded(self) -> int:
        """Channels of the integer input."""
        return -(-self.channels // CHANNELS) * CHANNELS

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def out_size(self) -> tuple[int, int]:
        """(P, Q)."""
        top, left, bottom, right = self.padding
        p = (self.height + top + bottom - self.kernel) // self.stride + 1
        return p, (self.width + left + right - self.kernel) // self.stride + 1

    @property
    def constants(self) -> dict[str, int]:
        """What the convolution's kernel is specialized for. Raises InputError beyond 32-bit offsets."""
        (p, q), (top, left, _, _) = self.out_size, self.padding
        if max(self.integer_bytes, self.sites * self.out_channels) >= 2**31:
            raise InputError(f"a layer of {self.channels} channels has over 2^31 elements at this batch; use a smaller one")
        names = ("C", "H", "W", "K", "P", "Q", "STRIDE", "TOP", "LEFT", "R")
        values = (self.padded, self.height, self.width, self.out_channels, p, q, self.stride, top, left, self.kernel)
        return dict(zip(names, values, strict=True))

    @property
    def sites(self) -> int:
        """Output pixels of all images."""
        p, q = self.out_size
        return self.batch * p * q

    @property
    def integer_bytes(self) -> int:
        """Bytes of the integer input [N, H*W, padded]."""
        return self.batch * self.pixels * self.padded


@dataclass(frozen=True)
class ConvTile:
    """A program's tile of the product: output pixels, channels, values of the sum it takes at a time, loads ahead, warps; and
    the parts into which the sum is split."""

    sites: int
    channels: int
    depth: int
    stages: int
    warps: int
    split: int


def conv_tile(geometry: Geometry, may_split: bool = True) -> ConvTile:
    """The tile for a convolution: the largest that still makes enough programs; where none does, small ones and split sums."""
    sites, out = geometry.sites, geometry.out_channels
    depth = next(d for d in (128, 64, CHANNELS) if geometry.padded % d == 0)
    if out <= 16:
        return ConvTile(64, 16, depth, stages=3, warps=4, split=1)
    for rows, columns in ((128, 64), (64, 64)):
        if -(-sites // rows) * -(-out // columns) >= FULL:
            return ConvTile(rows, columns, depth, stages=3, warps=4, split=1)
    rows, warps = (64, 4) if sites >= 64 else (16, 2)
    tiles = -(-sites // rows) * -(-out // 32)
    steps = geometry.kernel**2 * geometry.padded // depth
    parts = (9, 3) if may_split else ()
    split = next((s for s in parts if steps % s == 0 and tiles * s <= 1.5 * FULL), 1)
    return ConvTile(rows, 32, depth, stages=5, warps=warps, split=split)


def tiles_to_time(geometry: Geometry) -> list[ConvTile]:
    """`conv_tile`, and beside it the same with its sum in three parts where a program would be long: two programs then share a
    processor, and wait for each other's memory."""
    tile = conv_tile(geometry)
    steps = geometry.kernel**2 * geometry.padded // tile.depth
    tiles = -(-geometry.sites // tile.sites) * -(-geometry.out_channels // tile.channels)
    if tile.split == 1 and steps % 3 == 0 and steps >= LONG and 3 * tiles <= 6 * FULL:
        return [tile, replace(tile, split=3)]
    return [tile]


def real_tile(geometry: Geometry, second: int) -> ConvTile:
    """The tile for a convolution of real numbers, whose second source has `second` channels. A tile has at least 64 sites, so
    that tensor cores add in one order whatever the batch."""
    sites, out = geometry.sites, geometry.out_channels
    depth = next(d for d in (64, CHANNELS, 16) if geometry.channels % d == 0 and second % d == 0)
    if out <= 16:
        return ConvTile(128, 16, depth, stages=3, warps=4, split=1)
    for rows, columns in ((128, 128), (128, 64)):
        if out >= columns and -(-sites // rows) * -(-out // columns) >= FULL:
            return ConvTile(rows, columns, depth, stages=3, warps=4, split=1)
    return ConvTile(64, 32, depth, stages=4, warps=4, split=1)


def has_few_inputs(channels: int, kernel: int) -> bool:
    """Whether a convolution in float takes all taps and input channels of a pixel in one go."""
    return kernel > 1 and kernel**2 * channels <= MOST_OF_AN_EDGE


def has_few_outputs(out_channels: int, kernel: int, stride: int) -> bool:
    """Whether a convolution in float multiplies each pixel once for all taps, and adds up then."""
    return kernel > 1 and stride == 1 and kernel**2 * out_channels <= MOST_OF_AN_EDGE


def residual_variant(real: str) -> Variant:
    return Variant("residual", real, (), tile=RESIDUAL_TILE)


def conv_variant(geometry: Geometry, real: str) -> Variant:
    """Sums in one part: an engine's workspace is not zeroed."""
    tile = conv_tile(geometry, may_split=False)
    numbers = (tile.sites, tile.channels, tile.depth, tile.stages, tile.warps)
    return Variant("conv", real, tuple(geometry.constants.items()), tile=numbers)
