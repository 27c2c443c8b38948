import numpy as np
import pytest
import torch

from modiff_trt.core.grid import grid_max
from modiff_trt.networks.quantizers import (
    RangeHistogram,
    minmax_weight_scale,
    mse_weight_scale,
    quantize,
    quantize_weight,
)


def test_rounds_half_to_even_and_clips():
    x = torch.tensor([-9.0, -2.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    assert quantize(x, 1.0, 3).tolist() == [-4.0, -2.0, -0.0, 0.0, 2.0, 2.0, 3.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_scale_uses_the_whole_grid_in_every_channel(bits):
    weight = torch.randn(7, 5, 3, 3) * torch.logspace(-3, 3, 7)[:, None, None, None]
    q = quantize_weight(weight, minmax_weight_scale(weight, bits), bits)
    assert q.abs().flatten(1).amax(1).tolist() == [grid_max(bits)] * 7


def test_zero_channel_quantizes_to_zero():
    weight = torch.zeros(2, 3, 1, 1)
    weight[1] = 1
    for scale in (minmax_weight_scale(weight, 8), mse_weight_scale(weight, 8)):
        assert (scale > 0).all()
        assert torch.equal(quantize_weight(weight, scale, 8)[0], weight[0])


def test_mse_search_is_never_worse_than_minmax_per_channel():
    weight = torch.randn(9, 40, 3, 3)
    weight[0, 0, 0, 0] = 30.0

    def error(scale):
        return (weight - quantize_weight(weight, scale, 4) * scale[:, None, None, None]).abs().pow(2.4).flatten(1).sum(1)

    minmax, mse = error(minmax_weight_scale(weight, 4)), error(mse_weight_scale(weight, 4))
    assert (mse <= minmax).all()
    assert mse[1:].sum() < 0.85 * minmax[1:].sum()


def test_histogram_keeps_the_maximum_over_growing_batches():
    histogram = RangeHistogram()
    batches = [torch.randn(1000) * s for s in (0.01, 3.0, 0.5, 40.0)]
    for batch in batches:
        histogram.update(batch)
    everything = torch.cat(batches)
    assert histogram.absmax == pytest.approx(float(everything.abs().max()))
    assert histogram.minmax_scale(8) == pytest.approx(float(everything.abs().max()) / 127)
    assert float(histogram._counts.sum()) == 4000


def test_histogram_counts_more_than_float32_can():
    histogram = RangeHistogram()
    x = torch.zeros(2**25 + 3)
    x[0] = 1.0
    histogram.update(x)
    assert float(histogram._counts.sum()) == 2**25 + 3


def test_percentile_ignores_rare_outliers():
    histogram = RangeHistogram()
    x = torch.rand(100_000)
    histogram.update(torch.cat([x, torch.tensor([50.0])]))
    assert histogram.minmax_scale(8) == pytest.approx(50 / 127)
    assert histogram.percentile_scale(8, 0.9999) == pytest.approx(1 / 127, rel=0.05)
    shares, top = histogram.coarse()
    assert shares.shape == (64,) and float(shares.sum()) == pytest.approx(1.0) and top == pytest.approx(50.0)


def test_histogram_mse_scale_is_near_brute_force():
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    histogram = RangeHistogram()
    for part in x.split(30_000):
        histogram.update(part)

    def error(s):
        return float((x - quantize(x, s, 4) * s).abs().pow(2.4).mean())

    best = min(error(s) for s in np.linspace(0.05, 1.0, 400))
    assert error(histogram.mse_scale(4)) < 1.03 * best
    assert error(histogram.mse_scale(4)) < 0.9 * error(histogram.minmax_scale(4))


def test_a_searched_scale_weighs_large_errors_more_than_their_squares():
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x *= x.abs()  # many large values
    histogram = RangeHistogram()
    histogram.update(x)
    tried = np.linspace(0.05, 3.0, 300)
    least = {p: min(tried, key=lambda s, p=p: float((x - quantize(x, s, 4) * s).abs().pow(p).mean())) for p in (2.0, 2.4)}
    assert least[2.4] > 1.1 * least[2.0]
    assert abs(histogram.mse_scale(4) / least[2.4] - 1) < 0.07
