import numpy as np
import pytest

from modiff_trt.core.moving_grids import phases, shifts, shifts_of_phase


def test_a_shift_belongs_to_a_timestep_whatever_rows_there_are():
    """Warm-up rows have that of the first step, and tables in ascending order the same ones."""
    with_warmup = shifts(np.asarray([900, 900, 900, 500, 100, 7]), 40)
    assert np.array_equal(with_warmup[0], with_warmup[2])
    assert np.array_equal(with_warmup[2:], shifts(np.asarray([900, 500, 100, 7]), 40))
    assert np.array_equal(with_warmup[2:][::-1], shifts(np.asarray([7, 100, 500, 900]), 40))
    assert phases(np.asarray([900, 900, 500]))[:2].tolist() == [0, 0]


def test_shifts_are_of_a_channel_and_exact_in_float32():
    t = np.arange(50)[::-1]
    found, phase = shifts(t, 5120), phases(t)
    assert found.dtype == np.float32 and found.min() >= -0.5 and found.max() < 0.5
    assert np.array_equal(found * 2**16, np.rint(found.astype(np.float64) * 2**16))
    assert np.array_equal(found[:, :33], shifts(t, 33))
    assert np.array_equal(found[7], shifts_of_phase(int(phase[7]), 5120))


@pytest.mark.parametrize("count", [4, 8, 20, 100])
def test_neighbouring_steps_and_channels_fill_a_step_evenly(count):
    """A share of a step that is a part of it holds about that part of any `count` neighbouring shifts."""
    found = shifts(np.arange(200)[::-1], 320) + 0.5
    for line in (*found.T[:50], *found[:50]):
        for begin in range(0, len(line) - count, 7):
            part = np.sort(line[begin : begin + count])
            furthest = np.abs(part - (np.arange(count) + 0.5) / count).max()
            assert furthest < 4.0 / count
