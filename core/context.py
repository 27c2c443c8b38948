"""What images are conditioned on beside their noise: prompts, class labels, sizes. Arrays have diffusers' names. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.config import TIME_IDS, Architecture, Config
from modiff_trt.core.errors import InputError, shown

Arrays = Mapping[str, np.ndarray[Any, Any]]
# What guidance leads away from has the same names, with this before them.
NEGATIVE = "negative_"
PROMPT = "encoder_hidden_states"
MOST_GUIDANCE = 1000.0


@dataclass(frozen=True)
class Array:
    """One array of a context: integers or real numbers, and the shape of one image's, in which a name stands for any size."""

    integer: bool
    shape: tuple[int | str, ...]

    def fits(self, lines: np.ndarray[Any, Any]) -> bool:
        """Whether an array has the shape [P, ...], of at least one line."""
        there = lines.ndim == len(self.shape) + 1 and 0 not in lines.shape
        return there and all(isinstance(size, str) or size == n for size, n in zip(self.shape, lines.shape[1:], strict=True))

    def holds(self, lines: np.ndarray[Any, Any], classes: int) -> bool:
        """Whether these are lines as `load_context` gives them."""
        if not self.fits(lines):
            return False
        if self.integer:
            return lines.dtype == np.int64 and bool(lines.min() >= 0) and bool(lines.max() < classes)
        return lines.dtype == np.float32 and bool(np.isfinite(lines).all())

    @property
    def text(self) -> str:
        return f"[{', '.join(['N', *map(str, self.shape)])}]"


def context_arrays(a: Architecture) -> dict[str, Array]:
    """The arrays that a network's context has; none for a network that is given noise alone."""
    found = {}
    if a.cross_channels:
        found[PROMPT] = Array(False, ("S", a.cross_channels))
    if a.classes:
        found["class_labels"] = Array(True, ())
    if a.added_channels:
        found["text_embeds"] = Array(False, (a.added_channels - TIME_IDS * a.added_times,))
        found["time_ids"] = Array(False, (TIME_IDS,))
    return found


def from_noise_to_pictures(config: Config) -> bool:
    """Whether a network is given noise alone and makes pictures: no context, and no latents."""
    return not context_arrays(config.architecture) and not config.latent


@dataclass(frozen=True)
class Context:
    """Arrays [P, ...] by name: image i of a series has line i modulo P. With `guidance` G a denoiser answers
    u + G (c - u) (classifier-free guidance, arXiv 2207.12598), where u is the answer to `negative` and c that to `positive`."""

    positive: Arrays = field(default_factory=dict)
    negative: Arrays = field(default_factory=dict)
    guidance: float | None = None

    @property
    def copies(self) -> int:
        """Images that the network sees for each one that is made."""
        return 1 if self.guidance is None else 2

    def same_as(self, other: Context) -> bool:
        """Whether both say the same of every image."""
        pairs = ((self.positive, other.positive), (self.negative, other.negative))
        same = all(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in pairs)
        return same and self.guidance == other.guidance

    def of(self, indices: Sequence[int]) -> Arrays:
        """Of N images: [N, ...], or with guidance [2N, ...], the negative lines first."""
        sides = [self.positive] if self.guidance is None else [self.negative, self.positive]
        return {
            name: np.concatenate([side[name][np.asarray(indices) % len(side[name])] for side in sides])
            for name in self.positive
        }


NO_CONTEXT = Context()


def checked(context: Arrays | None) -> Arrays:
    """The arrays that a network with a context was given. Raises InputError where it was given none."""
    if not context:
        raise InputError("this network is given more than noise; pass a context")
    return context


def load_context(path: Path | None, guidance: float | None, architecture: Architecture) -> Context:
    """The context in an .npz file for a network. Raises InputError for what the network does not take, or lacks."""
    wanted = context_arrays(architecture)
    if path is None:
        if wanted:
            listed = ", ".join(f"{name} {array.text}" for name, array in wanted.items())
            raise InputError(f"this network is given more than noise; pass --context FILE.npz with {listed}")
        if guidance is not None:
            raise InputError("--guidance is for networks with a context, and this one has none")
        return NO_CONTEXT
    if not wanted:
        raise InputError("this network is given noise alone; leave --context out")
    if guidance is not None and not 0 <= guidance <= MOST_GUIDANCE:
        raise InputError(f"--guidance must lie between 0 and {MOST_GUIDANCE:g}, found {guidance}")
    if not path.is_file():
        raise InputError(f"--context {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy raises nearly anything for bytes that are no archive
        raise InputError(
            f"--context {path} is no .npz file of arrays ({type(error).__name__}); write it with numpy.savez"
        ) from None
    known = {*wanted, *(NEGATIVE + name for name in wanted)}
    for name in found:
        if name not in known:
            raise InputError(f"--context {path} has an array {shown(name)}; this network takes {', '.join(wanted)}")
    positive = {name: _line(path, found, name, array, architecture) for name, array in wanted.items()}
    if guidance is None:
        return Context(positive)
    negative = {}
    for name, array in wanted.items():
        # Sizes are the same on both sides, unless a file says otherwise.
        other = name if name == "time_ids" and NEGATIVE + name not in found else NEGATIVE + name
        negative[name] = _line(path, found, other, array, architecture)
    for name, side in negative.items():
        if name == PROMPT and side.shape[1] != positive[name].shape[1]:
            raise InputError(
                f"--context {path}: '{NEGATIVE}{name}' has {side.shape[1]} tokens, '{name}' {positive[name].shape[1]}; "
                "pad both to the same number"
            )
    return Context(positive, negative, guidance)


def _line(path: Path, found: Arrays, name: str, array: Array, architecture: Architecture) -> np.ndarray[Any, Any]:
    """One array as [P, ...], float32 or int64."""
    if name not in found:
        why = ", which --guidance needs" if name.startswith(NEGATIVE) else ""
        raise InputError(f"--context {path} has no '{name}' {array.text}{why}")
    value = found[name]
    if value.ndim == len(array.shape):
        value = value[None]
    if not array.fits(value):
        raise InputError(f"--context {path}: '{name}' has shape {list(found[name].shape)}, and should have {array.text}")
    if array.integer:
        if value.dtype.kind not in "iu" or value.min() < 0 or value.max() >= architecture.classes:
            raise InputError(f"--context {path}: '{name}' must hold integers from 0 to {architecture.classes - 1}")
        return value.astype(np.int64)
    if value.dtype.kind not in "iuf" or not np.isfinite(value.astype(np.float32)).all():
        raise InputError(f"--context {path}: '{name}' must hold finite numbers")
    return value.astype(np.float32)
