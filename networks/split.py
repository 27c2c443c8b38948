"""Two grids for a concatenated input (the "split" of Q-Diffusion, arXiv 2302.04304, section 4.2), with one baked scale.

The skip half of a concatenation often has another range than the main half. Dividing its channels by the ratio of the
two grids, and multiplying the weight's columns by it before they are quantized, gives each half its own grid while the
layer keeps a single activation scale, as TensorRT requires.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from modiff_trt.networks.operations import LayerSpec


def fold_skip(spec: LayerSpec, weight: Tensor, ratio: float) -> Tensor:
    """The weight [C_out, C_in, K, K] for an input whose skip channels were divided by `ratio`."""
    if ratio == 1.0:
        return weight
    folded = weight.clone()
    folded[:, spec.split :] *= ratio
    return folded


def divide_skip(spec: LayerSpec, x: Tensor, ratio: float) -> Tensor:
    """The input [N, C, H, W] with its skip channels divided by `ratio`."""
    if ratio == 1.0:
        return x
    return x * x.new_tensor(skip_factors(spec, ratio)).reshape(-1, 1, 1)


def skip_factors(spec: LayerSpec, ratio: float) -> np.ndarray:
    """What each input channel is multiplied by [C_in]: 1 for the main half, 1/ratio for the skip."""
    factors = np.ones(spec.in_shape[0], np.float32)
    factors[spec.split :] = 1 / ratio
    return factors
