"""SSIM of image pairs (Wang et al., 2004): Gaussian window of 11 pixels, sigma 1.5, each channel by itself."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.runtime.images.pictures import Images

WINDOW, SIGMA, LEVELS = 11, 1.5, 255.0
C1, C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2


def ssim(a: Images, b: Images, device: str = "cpu") -> np.ndarray:
    """float64 [n]: SSIM of each pair of images uint8 [n, H, W, C], over the positions where the window fits.

    Raises InputError for images smaller than the window.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise InputError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, found {a.shape[1:3]}")
    x, y = (torch.from_numpy(np.array(v)).to(device, torch.float64).permute(0, 3, 1, 2) for v in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y, both = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2, _blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + C1) * (2 * both + C2)
    bottom = (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    result: np.ndarray = (top / bottom).mean((1, 2, 3)).cpu().numpy()
    return result


def _blur(x: Tensor) -> Tensor:
    offset = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = weight / weight.sum()
    planes = x.flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(planes, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
    return blurred.view(*x.shape[:2], *blurred.shape[2:])
