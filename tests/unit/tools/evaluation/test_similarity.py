"""SSIM against torchmetrics, where the window fits."""

import numpy as np
import pytest
import torch

from modiff_trt.core.errors import InputError
from modiff_trt.tools.evaluation.similarity import ssim


def test_ssim_is_that_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 17, 23, 3), dtype=np.uint8)
    b = np.clip(a + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).double() for v in (a, b))
    _, everywhere = image.structural_similarity_index_measure(x, y, data_range=255.0, reduction="none", return_full_image=True)
    inside = everywhere[:, :, 5:-5, 5:-5]  # torchmetrics counts positions over mirrored edges too, the paper does not
    np.testing.assert_allclose(ssim(a, b), inside.mean((1, 2, 3)).numpy(), rtol=1e-6)
    np.testing.assert_allclose(ssim(a, a), 1.0)


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(InputError, match="at least 11"):
        ssim(np.zeros((1, 8, 32, 3), np.uint8), np.zeros((1, 8, 32, 3), np.uint8))
