"""Moving grids: a layer without state shifts its grid by a share of a step, by another one at every step and in every channel.

From one step of a sampler to the next an input hardly changes. Rounded to the same grid it is off by the same amount each
time, and the sampler adds that up. Where the grid moves, these errors differ, and cancel: on the CIFAR-10 network with 100
steps that is worth 3 dB (docs/lab/modes.md). The shift is subtracted again, as a part of the bias (subtractive dither). It
depends on the channel and on the timestep's place in the sequence alone, so that every runtime has the same one, and batches
change nothing.

In integers, of 16 bits: every backend finds the same float32. No torch: exported files have them as tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A shift is one of so many parts of a step. Channels and timesteps go on by golden sections of it, of two dimensions and of
# one: sequences that fill the step evenly, however short a part of them is taken.
PARTS = 1 << 16
CHANNEL, TIMESTEP = 49471, 40503


def phases(t: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shift of channel 0 at rows of these timesteps [rows], in parts of a step: 0 at the largest of them, and the same for
    equal ones."""
    _, place = np.unique(-t.astype(np.int64), return_inverse=True)
    return np.asarray(place.reshape(-1) * TIMESTEP % PARTS, np.int64)


def shifts(t: np.ndarray[Any, Any], channels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [rows, channels] from -1/2 up to 1/2: what is added to x / step before it is rounded, and subtracted after."""
    return shifts_of_phase(phases(t)[:, None], channels)


def shifts_of_phase(phase: int | np.ndarray[Any, Any], channels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [..., channels] of the rows with these phases [..., 1]."""
    parts = (phase + np.arange(channels, dtype=np.int64) * CHANNEL) % PARTS
    return (parts / PARTS - 0.5).astype(np.float32)
