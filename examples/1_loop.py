"""The sampling loop by hand, with the demo model: what a scheduler of your own would do.

    python examples/1_loop.py

A denoiser keeps the state of its modulated layers between passes. `reset` begins a trajectory, and nothing else does. The first
rows of a modulated network are warm-up passes: they bring the state up, and the image does not move.
"""

from pathlib import Path

from modiff_trt.core.scales import load_scales
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.options import load_model
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.images.noise import ImageNoise

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "calib_cache/demo"


def sample(denoiser, updates, x):
    """x_0 from x_T by deterministic DDIM: of each step's numbers two are enough (`core/solvers.py` says what the others do)."""
    rows = denoiser.rows
    denoiser.reset(len(x))
    for row in range(len(rows)):
        eps = denoiser(x, row)
        if row >= rows.warmup:
            step = row - rows.warmup
            x = float(updates.x[step]) * x + float(updates.y[step]) * eps
    return denoiser.to_host(x)


network, checkpoint = load_model(ROOT / "configs/demo.yml", DEMO / "model.safetensors")
scales = load_scales(DEMO / "modiff-w8a8.safetensors", network, checkpoint.sha256)
noise = ImageNoise(0, range(2), network.config.input_shape).draw()
updates = scales.solver.updates(network.config.diffusion, scales.rows.timesteps)
float_network = trained.unquantized(network, checkpoint.params, scales.rows.timesteps)
expected = sample(float_network, updates, float_network.from_host(noise))
modulated = trained.simulated(network, checkpoint.params, scales)
stateless = trained.simulated(network, checkpoint.params, scales.without_modulation())
for name, denoiser in (("MoDiff", modulated), ("Q-Diffusion", stateless)):
    print(f"{name}: {psnr(sample(denoiser, updates, denoiser.from_host(noise)), expected):.1f} dB to FP32")
