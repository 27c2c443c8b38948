"""What the method must do in the loop: these fail if state is dropped, reset inside the loop, or shared by a batch."""

import numpy as np
import pytest
import torch
from conftest import ROOT, ddim_state, random_checkpoint, tiny_config
from reference import ReferenceUNet, linear_alpha_bar, reference_ddim

from modiff_trt.core.kinds import Spacing
from modiff_trt.core.solvers import Solver
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser, TorchDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory


def onnx_denoiser(case, tmp_path, scales, timesteps=None, dtype="fp32"):
    file = tmp_path / "network.onnx"
    save_onnx(file, build_onnx(case.network, case.checkpoint, scales, dtype, "x" if scales else None))
    return OnnxDenoiser(load_onnx(file), timesteps)


class ResetsInside:
    """The defect of the released research code: the cache is cleared at every step."""

    def __init__(self, inner):
        self.inner, self.rows, self.state_info = inner, inner.rows, inner.state_info
        self.from_host, self.to_host, self.reset = inner.from_host, inner.to_host, inner.reset

    def __call__(self, x, row):
        self.inner.reset(len(x))
        return self.inner(x, row)


@pytest.mark.slow
def test_torch_backend_equals_float64_ddim(demo):
    state = ddim_state({k: v.double() for k, v in demo.checkpoint.params.items()}, 4)
    unet = ReferenceUNet(state, 64)
    x = torch.from_numpy(ImageNoise(0, range(2), (3, 32, 32)).draw()).double()
    expected = reference_ddim(unet, x, list(reversed(demo.timesteps)), linear_alpha_bar()).numpy()
    samples = demo.sample(demo.float_denoiser(), images=2)
    assert np.linalg.norm(samples - expected) / np.linalg.norm(expected) < 1e-4


def test_modulation_beats_stateless_and_needs_its_state(demo):
    reference = demo.sample(demo.float_denoiser())
    weights = psnr(demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, demo.scales(), act_quant=False)), reference)
    scales = demo.scales(act_bits=6, activation_method="minmax")
    modulated = SimDenoiser(demo.network, demo.checkpoint.params, scales)
    modiff = psnr(demo.sample(modulated), reference)
    qdiff = psnr(demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales.without_modulation())), reference)
    reset = psnr(demo.sample(ResetsInside(modulated)), reference)
    assert modiff > weights - 1.5
    assert modiff > qdiff + 3
    assert modiff > reset + 8
    assert reset < qdiff  # a residual grid without its state is no quantizer at all


def test_single_layers_are_quantized_and_all_others_exact(tiny):
    scales = tiny.scales().without_modulation()

    def images(act_quant):
        return tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, scales, act_quant=act_quant))

    exact, whole = images(act_quant=False), images(act_quant=True)
    np.testing.assert_array_equal(images(act_quant=list(scales.layers)), whole)
    name = tiny.network.layers[2].name
    alone = images(act_quant=(name,))
    rest = images(act_quant=[other for other in scales.layers if other != name])
    assert not np.array_equal(alone, exact) and not np.array_equal(rest, whole)
    assert psnr(alone, exact) > psnr(rest, exact)
    with pytest.raises(ValueError, match="scales without state"):
        SimDenoiser(tiny.network, tiny.checkpoint.params, tiny.scales(), act_quant=(name,))


def test_state_follows_the_input_and_reset_is_the_one_place_that_clears_it(tiny):
    denoiser = SimDenoiser(tiny.network, tiny.checkpoint.params, tiny.scales())
    assert {info.name.split(".")[0] for info in denoiser.state_info} == {"a_hat", "o_hat"}
    first = tiny.sample(denoiser)
    ended = {name: state.a_hat for name, state in denoiser.state.items()}
    denoiser.reset(4)
    for name, state in denoiser.state.items():
        assert state.a_hat.abs().max() <= 0.5 * denoiser.layers[name].scale < ended[name].abs().max()
    np.testing.assert_array_equal(tiny.sample(denoiser), first)


def test_without_dither_a_trajectory_starts_from_zero_and_bias(tiny):
    denoiser = SimDenoiser(tiny.network, tiny.checkpoint.params, tiny.scales(dither=False))
    denoiser.reset(4)
    for name, state in denoiser.state.items():
        assert state.a_hat.abs().max() == 0
        bias = denoiser.layers[name].bias[:, None, None]
        assert torch.equal(state.o_hat, bias.expand_as(state.o_hat))


def test_dither_is_uniform_inside_the_grid_and_o_hat_answers_it(tiny):
    denoiser = SimDenoiser(tiny.network, tiny.checkpoint.params, tiny.scales())
    denoiser.reset(3)
    layer, state = denoiser.layers["conv_in"], denoiser.state["conv_in"]
    assert torch.equal(state.a_hat[0], state.a_hat[2])  # the same for every image, so batches change nothing
    offsets = torch.cat([s.a_hat[0].flatten() / denoiser.layers[n].scale for n, s in denoiser.state.items()])
    assert offsets.abs().max() <= 0.5 and abs(float(offsets.mean())) < 0.01
    assert float(offsets.std()) == pytest.approx(12**-0.5, rel=0.02)
    weight = layer.weight * layer.weight_scale[:, None, None, None]
    torch.testing.assert_close(state.o_hat, torch.nn.functional.conv2d(state.a_hat, weight, layer.bias, padding=1))


@pytest.mark.parametrize("dither", [True, False])
def test_exported_file_starts_from_the_same_state(tiny, tmp_path, dither):
    scales = tiny.scales(dither=dither)
    simulated = SimDenoiser(tiny.network, tiny.checkpoint.params, scales)
    exported = onnx_denoiser(tiny, tmp_path, scales)
    simulated.reset(2)
    exported.reset(2)
    for name, state in simulated.state.items():
        np.testing.assert_allclose(exported.state[f"a_hat.{name}"], state.a_hat, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(exported.state[f"o_hat.{name}"], state.o_hat, rtol=1e-4, atol=1e-5)


def test_warmup_rows_replace_the_full_precision_first_step(demo):
    reference = demo.sample(demo.float_denoiser())
    two, exact = (
        psnr(demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, demo.scales(start=start))), reference)
        for start in ("warmup", "exact")
    )
    assert two > exact - 0.2


@pytest.mark.parametrize("kind", ["torch", "modiff", "qdiff", "onnx-modiff", "onnx-float"])
def test_batch_size_never_changes_an_image(tiny, tmp_path, kind):
    scales = tiny.scales(method="qdiff" if kind == "qdiff" else "modiff", act_bits=6)
    if kind == "torch":
        denoiser = tiny.float_denoiser()
    elif kind.startswith("onnx"):
        denoiser = onnx_denoiser(tiny, tmp_path, None if kind == "onnx-float" else scales, tiny.timesteps)
    else:
        denoiser = SimDenoiser(tiny.network, tiny.checkpoint.params, scales)
    updates, shape = tiny.updates(), tiny.network.config.input_shape
    runs = {}
    for batch in (1, 3, 8):
        parts = [range(i, min(i + batch, 8)) for i in range(0, 8, batch)]
        runs[batch] = np.concatenate([sample_trajectory(denoiser, updates, ImageNoise(5, p, shape).draw()) for p in parts])
    # Libraries choose a convolution algorithm by batch size, so FP32 sums may be rounded differently. Where values are
    # also rounded to a grid, such a difference can move one of them by a whole grid step.
    tolerance = 1e-5 if kind in ("torch", "onnx-float") else 2e-2
    for batch in (3, 8):
        scale = np.abs(runs[1]).max()
        assert np.abs(runs[batch] - runs[1]).max() <= tolerance * scale, kind


def test_onnxruntime_images_agree_with_the_simulation(demo, tmp_path):
    for bits in (8, 6):
        scales = demo.scales(act_bits=bits)
        simulated = demo.sample(SimDenoiser(demo.network, demo.checkpoint.params, scales))
        denoiser = onnx_denoiser(demo, tmp_path, scales)
        run = demo.sample(denoiser)
        assert psnr(run, simulated) >= 40
        np.testing.assert_array_equal(demo.sample(denoiser), run)  # buffers carry nothing over


def test_onnx_state_is_bound_not_copied(tiny, tmp_path):
    denoiser = onnx_denoiser(tiny, tmp_path, tiny.scales())
    denoiser.reset(2)
    addresses = [{n: v.data_ptr() for n, v in buffers.items()} for buffers in denoiser._buffers]
    x = ImageNoise(0, range(2), tiny.network.config.input_shape).draw()
    for row in range(4):
        denoiser(x, row)
    assert [{n: v.data_ptr() for n, v in buffers.items()} for buffers in denoiser._buffers] == addresses
    info = {i.name: i for i in denoiser.state_info}
    assert info["a_hat.conv_in"].shape == (3, 12, 12) and info["a_hat.conv_in"].nbytes == 3 * 144 * 4


def test_what_onnxruntime_returns_stays_as_it_was(tiny, tmp_path, monkeypatch):
    denoiser = onnx_denoiser(tiny, tmp_path, tiny.scales())
    x = ImageNoise(0, range(2), tiny.network.config.input_shape).draw()
    denoiser.reset(2)
    eps, state = denoiser(x, 0), denoiser.state
    before = eps.copy(), {name: value.copy() for name, value in state.items()}
    for row in (1, 2):
        denoiser(x, row)
    np.testing.assert_array_equal(eps, before[0])
    assert all((state[name] == before[1][name]).all() for name in state)
    with monkeypatch.context() as patch:
        patch.setattr(denoiser._session, "io_binding", lambda: (_ for _ in ()).throw(RuntimeError("memory")))
        with pytest.raises(RuntimeError):
            denoiser.reset(3)
    denoiser.reset(3)
    assert denoiser(x[[0, 0, 1]], 0).shape == (3, *x.shape[1:])


def test_the_loop_of_the_interface_s_description(tiny, tmp_path):
    expected = tiny.sample(onnx_denoiser(tiny, tmp_path, tiny.scales()))
    text = (ROOT / "export/onnx/INTERFACE.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    path = next(tmp_path.glob("*.onnx"))
    names = {"path": path, "x": ImageNoise(0, range(len(expected)), tiny.network.config.input_shape).draw()}
    exec(code, names)
    np.testing.assert_allclose(names["x"], expected, rtol=0, atol=1e-5)


def test_fp16_file_samples(tiny, tmp_path):
    scales = tiny.scales()
    wide = tiny.sample(onnx_denoiser(tiny, tmp_path, scales))
    half = onnx_denoiser(tiny, tmp_path, scales, dtype="fp16")
    assert half.state_info[0].nbytes == 3 * 144 * 2
    assert np.linalg.norm(tiny.sample(half) - wide) / np.linalg.norm(wide) < 0.1


def test_eta_draws_fresh_noise_for_each_image(tiny):
    shape = tiny.network.config.input_shape

    def run(indices, eta):
        noise = ImageNoise(0, indices, shape)
        return sample_trajectory(tiny.float_denoiser(), tiny.updates(eta), noise.draw(), draw_noise=noise.draw)

    np.testing.assert_allclose(run([0, 1], 1.0)[1], run([1], 1.0)[0], rtol=1e-3, atol=1e-3)
    assert np.abs(run([0], 1.0) - run([0], 0.0)).max() > 0.01


def test_float64_simulation_is_close_to_float32():
    config = tiny_config(8, (1,), ())
    network, checkpoint = trace(config), random_checkpoint(config)
    solver = Solver(spacing=Spacing.UNIFORM)
    timesteps = solver.timesteps(config.diffusion, 5)
    x = ImageNoise(0, range(2), config.input_shape).draw()
    updates = solver.updates(config.diffusion, timesteps)
    single, double = (
        sample_trajectory(TorchDenoiser(network, checkpoint.params, timesteps, dtype=dtype), updates, x)
        for dtype in (torch.float32, torch.float64)
    )
    np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-4)
