import numpy as np
import pytest
import torch
from small_network import small_case

from modiff_trt.core.scales import load_scales, save_scales
from modiff_trt.export.calibration import pipeline as calibrating
from modiff_trt.export.calibration.adaround import AdaRoundOptions, SoftRounding, learn_rounding, rectified_sigmoid
from modiff_trt.export.calibration.reconstruct import Samples, WeightGrid, reconstruct, units
from modiff_trt.networks.binding import times
from modiff_trt.networks.quantizers import minmax_weight_scale, pack_rounding, quantize_weight, unpack_rounding
from modiff_trt.networks.torch_ops import convolve, layer_bias, layer_weight, run_unet


def test_starts_from_the_float_weight():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    scale = minmax_weight_scale(weight, 4)
    torch.testing.assert_close(SoftRounding(weight, scale, 4).weight(), weight, atol=1e-9, rtol=1e-9)
    assert rectified_sigmoid(torch.tensor([-20.0, 0.0, 20.0])).tolist() == pytest.approx([0, 0.5, 1])


def test_regularizer_and_its_schedule():
    soft = SoftRounding(torch.tensor([[0.5, 0.0]]), torch.tensor([1.0]), 8)
    assert float(soft.regularizer(2.0)) == pytest.approx(1.0, abs=1e-5)  # one undecided, one decided
    options = AdaRoundOptions(iterations=100)
    assert options.beta(0) is None and options.beta(19) is None
    assert options.beta(20) == pytest.approx(20) and options.beta(100) == pytest.approx(2)


def test_beats_nearest_on_correlated_inputs_and_decides_every_weight():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 24, generator=generator) * 0.1
    x = torch.randn(256, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    scale = minmax_weight_scale(weight, 3)
    soft = SoftRounding(weight, scale, 3)

    def loss(indices):
        return ((x[indices] @ soft.weight().T) - x[indices] @ weight.T).square().sum(1).mean()

    learn_rounding({"w": soft}, loss, 256, AdaRoundOptions(iterations=600, batch_size=64), generator)

    def error(round_up):
        quantized = quantize_weight(weight, scale, 3, round_up) * scale[:, None]
        return float((x @ (quantized - weight).T).square().mean())

    assert error(soft.round_up()) < 0.5 * error(None)
    h = rectified_sigmoid(soft.v.detach())
    assert ((h < 0.05) | (h > 0.95)).float().mean() > 0.95


def test_rounding_is_up_or_down_by_less_than_a_step():
    weight = torch.randn(3, 5, 1, 1)
    scale = minmax_weight_scale(weight, 8)
    up = torch.rand(weight.shape) < 0.5
    packed = pack_rounding(up)
    assert packed.dtype == np.uint8 and packed.size == 2
    assert torch.equal(unpack_rounding(packed, weight), up)
    q = quantize_weight(weight, scale, 8, up)
    cells = weight / scale[:, None, None, None]
    torch.testing.assert_close(q, (cells.floor() + up).clamp(-127, 127))


def test_units_hold_every_layer_once(tiny):
    found = [spec.name for unit in units(tiny.network) for spec in unit.layers]
    assert found == [spec.name for spec in tiny.network.layers]
    by_name = {unit.name: unit for unit in units(tiny.network)}
    assert (
        len(by_name["up_blocks.1.resnets.0"].layers) == 3
        and by_name["mid_block.attentions.0"].is_block
        and not by_name["conv_in"].is_block
    )


def eps_error(case, decisions, grids):
    """Error of the whole network's output with rounded weights, on samples that were not trained on."""
    params, network = case.checkpoint.params, case.network
    weights = {s.name: layer_weight(s, params) for s in network.layers}

    def layer(spec, x):
        grid = grids[spec.name]
        q = quantize_weight(weights[spec.name], grid.scale, grid.bits, decisions.get(spec.name))
        return convolve(spec, x, q * grid.scale.reshape(-1, 1, 1, 1), layer_bias(spec, params))

    torch.manual_seed(5)
    x, t = torch.randn(8, *network.config.input_shape), torch.arange(0, 800, 100)
    bias = times(network, params, t)
    with torch.no_grad():
        return float((run_unet(network, params, x, bias, layer) - run_unet(network, params, x, bias)).square().mean())


OPTIONS = AdaRoundOptions(iterations=120, batch_size=16)


@pytest.fixture(scope="module")
def small():
    return small_case()


def test_reconstruction_beats_nearest_and_resumes_to_the_same_result(small):
    params = small.checkpoint.params
    grids = {s.name: WeightGrid(minmax_weight_scale(layer_weight(s, params), 3), 3) for s in small.network.layers}
    torch.manual_seed(1)
    samples = Samples(
        torch.randn(48, *small.network.config.input_shape), torch.randint(0, 1000, (48,)), torch.zeros(48, dtype=torch.long), {}
    )
    kept = {}

    def run(done, stop_after=None):
        def on_unit(unit, found, loss):
            kept.update(found)
            if stop_after is not None and len(kept) >= stop_after:
                raise KeyboardInterrupt

        return reconstruct(small.network, params, grids, samples, OPTIONS, 0, done, on_unit)

    whole = run({})
    assert eps_error(small, whole, grids) < 0.7 * eps_error(small, {}, grids)
    kept.clear()
    with pytest.raises(KeyboardInterrupt):
        run({}, stop_after=5)
    resumed = run(dict(kept))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_command_resumes_and_the_file_keeps_the_decisions(tiny, tmp_path, monkeypatch):
    scales = tiny.scales(weight_bits=4)
    part = tmp_path / "s.part"
    arguments = (tiny.network, tiny.checkpoint, tiny.trajectories, scales, AdaRoundOptions(iterations=10), 0, "cpu", part)
    whole = calibrating.learn_weights(*arguments)
    part.unlink()
    saves, real = [], calibrating.save_arrays

    def interrupted(*a):
        real(*a)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "save_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrating.learn_weights(*arguments)
    assert part.exists()
    resumed = calibrating.learn_weights(*arguments)
    assert len(saves) == len(units(tiny.network))  # the first three were not learned again
    save_scales(tmp_path / "s.safetensors", resumed)
    loaded = load_scales(tmp_path / "s.safetensors")
    for name, layer in whole.layers.items():
        np.testing.assert_array_equal(loaded.layers[name].round_up, layer.round_up)


def test_layers_in_float_are_not_rounded(tiny, tmp_path):
    scales = tiny.scales(min_intensity=100.0)
    options = AdaRoundOptions(iterations=2, batch_size=2)
    learned = calibrating.learn_weights(
        tiny.network, tiny.checkpoint, tiny.trajectories, scales, options, 0, "cpu", tmp_path / "part"
    )
    for layer in learned.layers.values():
        assert (layer.round_up is None) == (layer.mode == "float")
