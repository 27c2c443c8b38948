"""The grid that an integer state counts on. Native kernels keep `a_hat` as int16 numbers of a unit, and each pass's step is a
whole number of units. Calibration writes such steps, so that what its trials see is what a deployed engine computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from modiff_trt.core.kinds import Granularity
from modiff_trt.core.scales import Scales

# The largest |count| of a state: it fits int16, and both bytes of low + 256 high fit int8.
STATE_MAX = 127 + 256 * 127
# a_hat can follow an activation of at least so many times the largest seen in calibration; what is beyond is clipped.
HEADROOM = (2.0, 1.25)
FINEST_UNIT = 256


def units_a_scale(scales: Scales, name: str) -> float:
    """Units in the baked scale of a modulated layer; less than 1 where int16 cannot count up to its activation.

    A power of two, as fine as a state can still count to HEADROOM times the largest activation; where that leaves less than a
    quarter of the step, the smaller headroom does.
    """
    layer = scales.layers[name]
    at = list(scales.layers).index(name)
    # The skip half of a split input is divided by the ratio, and may come out larger than it was measured.
    largest = float(scales.activation_range[:, at].max()) / min(1.0, layer.skip_ratio)
    units = 0.0
    for headroom in HEADROOM:
        finest = np.log2(STATE_MAX * layer.scale / (headroom * max(largest, layer.scale)))
        units = float(min(2.0 ** np.floor(finest), FINEST_UNIT))
        if units >= 4:
            break
    return units


def with_whole_steps(scales: Scales) -> Scales:
    """The same scales, with each pass's step of each modulated layer the nearest whole number of its units.

    The first pass's step decides where the cells of all later ones lie, and a change of it by one percent moved the PSNR of
    whole trajectories by up to 1 dB, in either direction. Layers whose grid is too fine for int16 stay as they are: only
    backends with a real state run them.
    """
    if scales.granularity != Granularity.STATIC:
        return scales
    multipliers = scales.rows.multipliers.copy()
    for column, name in enumerate(scales.modulated):
        units = units_a_scale(scales, name)
        if units >= 1:
            multipliers[:, column] = whole_units(multipliers[:, column], units) / units
    return replace(scales, rows=replace(scales.rows, multipliers=multipliers))


def whole_units(multipliers: np.ndarray, units: float) -> np.ndarray:
    """The nearest whole numbers of units, at least one, float64 [rows]: exact for steps that `with_whole_steps` wrote."""
    return np.maximum(np.rint(multipliers.astype(np.float64) * units), 1.0)
