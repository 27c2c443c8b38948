import numpy as np
import pytest
import torch

from modiff_trt.networks.research import QuantModel
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.noise import ImageNoise


def loop(model, case, reset_inside=False):
    x = torch.from_numpy(ImageNoise(0, range(4), case.network.config.input_shape).draw())
    model.reset_cache()
    updates = case.updates()
    for i, t in enumerate(case.timesteps):
        if reset_inside:
            model.reset_cache()
        x = float(updates.x[i]) * x + float(updates.y[i]) * model(x, torch.full((4,), t))
    return x.numpy()


def test_equals_the_functional_core(tiny):
    scales = tiny.scales(act_bits=4, activation_method="minmax")
    model = QuantModel(tiny.network, tiny.checkpoint.params, scales)
    expected = tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, scales))
    # Libraries may choose another kernel for arrays that lie elsewhere in memory: the last bits are theirs.
    np.testing.assert_allclose(loop(model, tiny), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loop(model, tiny), expected, rtol=1e-4, atol=1e-4)  # a second trajectory begins afresh
    with pytest.raises(ValueError, match="expect timestep"):
        loop(model, tiny, reset_inside=True)


def test_quant_states(tiny):
    scales = tiny.scales()
    model = QuantModel(tiny.network, tiny.checkpoint.params, scales)
    model.set_quant_state(False, False)
    np.testing.assert_array_equal(loop(model, tiny), tiny.sample(tiny.float_denoiser()))
    model.set_quant_state(True, False)
    weights = SimDenoiser(tiny.network, tiny.checkpoint.params, scales, act_quant=False)
    np.testing.assert_array_equal(loop(model, tiny), tiny.sample(weights))
    assert model(torch.zeros(2, *tiny.network.config.input_shape), 7).isfinite().all()  # no state: any timestep, any batch
    with pytest.raises(ValueError, match="weight_quant"):
        model.set_quant_state(False, True)


def test_another_batch_and_timesteps_of_no_schedule_are_noticed(tiny):
    model = QuantModel(tiny.network, tiny.checkpoint.params, tiny.scales())
    x = torch.zeros(2, *tiny.network.config.input_shape)
    model(x, tiny.timesteps[0])
    with pytest.raises(ValueError, match="batch changed"):
        model(x[:1], tiny.timesteps[1])
    with pytest.raises(ValueError, match="does not exist"):
        model(x, 1000)


def test_a_forgotten_reset_is_noticed(tiny):
    model = QuantModel(tiny.network, tiny.checkpoint.params, tiny.scales())
    loop(model, tiny)
    with pytest.raises(RuntimeError, match="reset_cache"):
        model(torch.zeros(4, *tiny.network.config.input_shape), 5)
