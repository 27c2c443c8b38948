import numpy as np
import pytest
import torch

from modiff_trt.core.errors import InputError
from modiff_trt.networks.affine import FITS, fit_quantizer

SHAPES = [(7, 5, 3, 3), (1, 1), (3, 33, 1, 17)]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_and_simulation_agree_bit_for_bit(shape, bits, per_channel, symmetric, fit):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) * 3 + 0.7
    quantizer = fit_quantizer(x, bits, symmetric=symmetric, per_channel=per_channel, fit=fit)
    native = quantizer.quantize(x)
    assert native.values.dtype == torch.int8
    assert int(native.values.min()) >= -(2 ** (bits - 1)) and int(native.values.max()) < 2 ** (bits - 1)
    assert torch.equal(native.dequantize(), quantizer.simulate(x))
    assert native.scale.shape == ((shape[0],) if per_channel else ())
    if symmetric:
        assert (native.zero_point == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_error_is_at_most_half_a_step(symmetric):
    x = torch.randn(4, 1000)
    quantizer = fit_quantizer(x, 6, symmetric=symmetric, per_channel=True)
    error = (quantizer.simulate(x) - x).abs()
    # an asymmetric zero point is rounded itself, so its ends may clip by another half step
    assert (error <= quantizer.scale[:, None] * (0.5 if symmetric else 1.0) + 1e-6).all()


def test_equals_a_plain_numpy_definition():
    x = np.random.default_rng(0).standard_normal(500).astype(np.float32) + 1
    quantizer = fit_quantizer(torch.from_numpy(x), 4, symmetric=False)
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 15)
    zero = np.clip(np.rint(-8 - low / scale), -8, 7)
    q = np.clip(np.rint(x / scale) + zero, -8, 7)
    np.testing.assert_array_equal(quantizer.quantize(torch.from_numpy(x)).values.numpy(), q)


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_search_beats_minmax_and_asymmetry_helps_skewed_data(power, symmetric):
    x = torch.nn.functional.silu(torch.randn(3, 4000) * 2)

    def error(fit, symmetric=symmetric):
        q = fit_quantizer(x, 4, symmetric=symmetric, per_channel=True, fit=fit, power=power)
        return float((q.simulate(x) - x).abs().pow(power).mean())

    assert error("mse") < error("minmax")
    assert error("mse", False) < error("mse", True)


def test_padding_stays_exactly_zero():
    x = torch.rand(100) + 2.0
    assert fit_quantizer(x, 4, symmetric=False).simulate(torch.zeros(3)).eq(0).all()


@pytest.mark.parametrize("bad", [{"bits": 9}, {"bits": 1}, {"bits": 8, "fit": "kl"}])
def test_refusals(bad):
    with pytest.raises(InputError):
        fit_quantizer(torch.randn(3), **bad)
    with pytest.raises(InputError, match="NaN"):
        fit_quantizer(torch.tensor([torch.nan]), 8)
