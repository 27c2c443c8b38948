import pytest
import torch

from modiff_trt.export.calibration.pipeline import refit_residuals
from modiff_trt.export.calibration.residuals import learn_residual_scale, refit
from modiff_trt.export.calibration.static import Recipe
from modiff_trt.networks.modulated import LayerState, integer_product, modulated_layer, quantize_layers


def test_a_learned_scale_beats_min_max_on_the_output(tiny):
    """A few outliers make min-max coarse: the learned grid gives most values more cells."""
    layers = quantize_layers(tiny.network, tiny.checkpoint.params, tiny.scales(act_bits=4))
    name = "up_blocks.1.resnets.1.conv2"
    generator = torch.Generator().manual_seed(0)
    a_hat = torch.randn(3, *layers[name].spec.in_shape, generator=generator)
    residual = 0.1 * torch.randn(a_hat.shape, generator=generator)
    residual[0, 0, 0, 0] = 3.0
    from dataclasses import replace

    layer = replace(layers[name], scale=3.0 / 7)
    learned = learn_residual_scale(layer, a_hat + residual, a_hat, iterations=100, penalty=0.0)

    def error(scale):
        start = LayerState(a_hat, integer_product(layer, a_hat))
        y, _ = modulated_layer(replace(layer, scale=scale), a_hat + residual, start, 1.0)
        return float((y - integer_product(layer, a_hat + residual)).square().mean())

    assert learned < layer.scale and error(learned) < 0.5 * error(layer.scale)
    strict = learn_residual_scale(layer, a_hat + residual, a_hat, iterations=100, penalty=1e4)
    assert strict > learned  # the penalty is on what the grid cannot reach


def test_refit_keeps_the_first_grid_and_changes_the_running_one(tiny):
    scales = tiny.scales(act_bits=6)
    halved = refit(scales, {n: scales.layers[n].residual_scale / 2 for n in scales.modulated})
    for i, name in enumerate(scales.modulated):
        assert halved.layers[name].scale == scales.layers[name].scale / 2
        first = scales.rows.multipliers[0, i]
        assert halved.rows.multipliers[0, i] == pytest.approx(2 * first)
    assert (halved.rows.multipliers[halved.rows.warmup :] == 1).all()


@pytest.mark.parametrize("method", ["minmax", "learned"])
def test_residuals_of_the_quantized_network_are_measured_in_its_own_trajectory(tiny, method):
    scales = tiny.scales(act_bits=4)
    found = refit_residuals(
        tiny.network, tiny.checkpoint, tiny.trajectories, scales, Recipe(act_bits=4, scale_method=method), 3, "cpu"
    )
    assert found.modulated == scales.modulated
    ratios = [found.layers[n].scale / scales.layers[n].scale for n in scales.modulated]
    assert all(0.05 < r < 20 for r in ratios) and any(abs(r - 1) > 0.05 for r in ratios)
