"""The sampling loop by hand, with the demo model: what a scheduler of your own would do.

    python examples/1_loop.py

A denoiser keeps the state of its modulated layers between passes. `reset` begins a trajectory, and nothing else does. The first
rows of a modulated network are warm-up passes: they bring the state up, and the image does not move.
"""

from pathlib import Path

import numpy as np

from modiff_trt import denoiser, load_model, load_scales

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "calib_cache/demo"


def sample(backend, x):
    """x_0 from x_T by deterministic DDIM: of each step's numbers two are enough (`core/solvers.py` says what the others do)."""
    network, updates = backend.denoiser, backend.updates(eta=0.0)
    network.reset(len(x))
    x = network.from_host(x)
    for row in range(len(network.rows)):
        eps = network(x, row)
        if row >= network.rows.warmup:
            step = row - network.rows.warmup
            x = float(updates.x[step]) * x + float(updates.y[step]) * eps
    return network.to_host(x)


def psnr(a, b):
    """Of images in -1..1."""
    return 10 * np.log10(4 / np.mean((np.clip(a, -1, 1) - np.clip(b, -1, 1)) ** 2))


model = load_model(config=ROOT / "configs/demo.yml", ckpt=DEMO / "model.safetensors")
scales = load_scales(DEMO / "modiff-w8a8.safetensors", model)
noise = np.random.default_rng(0).standard_normal((2, *model.network.config.input_shape), np.float32)
expected = sample(denoiser(model, backend="torch", timesteps=len(scales.rows.timesteps)), noise)
modulated = denoiser(model, scales, backend="torch-sim")
stateless = denoiser(model, scales.without_modulation(), backend="torch-sim")
for name, backend in (("MoDiff", modulated), ("Q-Diffusion", stateless)):
    print(f"{name}: {psnr(sample(backend, noise), expected):.1f} dB to FP32")
