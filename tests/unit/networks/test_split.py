import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modiff_trt.export.calibration.pipeline import residual_scales
from modiff_trt.export.calibration.static import Recipe
from modiff_trt.networks.modulated import quantize_layers
from modiff_trt.networks.split import divide_skip, fold_skip


@pytest.mark.parametrize("ratio", [0.13, 1.0, 7.5])
def test_folding_and_dividing_leave_the_layer_as_it_was(tiny, ratio):
    spec = next(s for s in tiny.network.layers if s.split)
    x = torch.randn(2, *spec.in_shape, dtype=torch.float64)
    weight = torch.randn(5, spec.in_shape[0], spec.kernel, spec.kernel, dtype=torch.float64)
    again = F.conv2d(divide_skip(spec, x, ratio), fold_skip(spec, weight, ratio))
    torch.testing.assert_close(again, F.conv2d(x, weight), rtol=1e-5, atol=1e-5)


def test_each_half_gets_the_grid_of_its_own_range(tiny):
    scales, whole = tiny.scales(split=True), tiny.scales()
    found = 0
    for spec in tiny.network.layers:
        layer, ranges = scales.layers[spec.name], tiny.ranges[spec.name]
        if not spec.split:
            assert layer.skip_ratio == 1 and layer.scale == whole.layers[spec.name].scale
            continue
        found += 1
        if layer.mode == "modiff":
            main, skip = (half.residual.absmax / 127 for half in ranges.halves)
        else:
            main, skip = (half.activation.absmax / 127 for half in ranges.halves)
        assert layer.scale == pytest.approx(main, rel=1e-5)
        assert layer.scale * layer.skip_ratio == pytest.approx(skip, rel=1e-5)
        assert max(main, skip) == pytest.approx(whole.layers[spec.name].scale, rel=1e-5)
    assert found


def test_weights_are_quantized_after_folding(tiny):
    scales = tiny.scales(split=True)
    layers = quantize_layers(tiny.network, tiny.checkpoint.params, scales)
    for spec in tiny.network.layers:
        if spec.split:
            ratio = scales.layers[spec.name].skip_ratio
            folded = tiny.checkpoint.params[f"{spec.name}.weight"].numpy().copy()
            folded[:, spec.split :] *= ratio
            expected = np.rint(folded / layers[spec.name].weight_scale.numpy()[:, None, None, None])
            np.testing.assert_allclose(layers[spec.name].weight.numpy(), np.clip(expected, -127, 127), atol=0)
            assert np.abs(layers[spec.name].weight.numpy()).max() == 127


def test_other_residual_scales_hold_their_share_of_both_halves(tiny):
    """The weights stay folded with the ratio that they were folded with."""
    recipe = Recipe(split=True)
    scales = tiny.scales(split=True)
    found = residual_scales(tiny.network, tiny.checkpoint, tiny.trajectories, tiny.ranges, recipe, scales, 0.9)
    differ = 0
    for name in scales.modulated:
        halves, ratio = tiny.ranges[name].halves, scales.layers[name].skip_ratio
        if halves is not None:
            main, skip = (half.residual.scale("percentile", 8, 0.9) for half in halves)
            assert found[name] == pytest.approx(max(main, skip / ratio), rel=1e-5)
            differ += skip / ratio > 1.01 * main
    assert differ  # otherwise this would not see the ratio
