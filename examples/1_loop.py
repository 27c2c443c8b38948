"""The sampling loop by hand, with the demo model: what a scheduler of your own would do.

    python examples/1_loop.py

A denoiser keeps the state of its modulated layers between passes. `reset` begins a trajectory, and nothing else does. The first
rows of a modulated network are warm-up passes: they bring the state up, and the image does not move.
"""

from pathlib import Path

from modiff_trt.core.scales import load_scales
from modiff_trt.core.schedule import alphas_cumprod, ddim_steps
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.options import load_model
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "calib_cache/demo"


def sample(denoiser, alpha_bar, x):
    """x_0 from x_T by deterministic DDIM."""
    rows = denoiser.rows
    updates = iter(ddim_steps(alpha_bar, rows.timesteps, eta=0.0))
    denoiser.reset(len(x))
    for row in range(len(rows)):
        eps = denoiser(x, row)
        if row >= rows.warmup:
            update = next(updates)
            x = update.x_coef * x + update.eps_coef * eps
    return denoiser.to_host(x)


network, checkpoint = load_model(ROOT / "configs/demo.yml", DEMO / "model.safetensors")
scales = load_scales(DEMO / "modiff-w8a8.safetensors", network, checkpoint.sha256)
noise = ImageNoise(0, range(2), network.config.input_shape).draw()
alpha_bar = alphas_cumprod(network.config.diffusion)
float_network = trained.unquantized(network, checkpoint.params, scales.rows.timesteps)
expected = sample(float_network, alpha_bar, float_network.from_host(noise))
modulated = trained.simulated(network, checkpoint.params, scales)
stateless = trained.simulated(network, checkpoint.params, scales.without_modulation())
for name, denoiser in (("MoDiff", modulated), ("Q-Diffusion", stateless)):
    print(f"{name}: {psnr(sample(denoiser, alpha_bar, denoiser.from_host(noise)), expected):.1f} dB to FP32")
