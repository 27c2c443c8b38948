"""From a checkpoint of your own to an exported INT8 network, by the functions behind the commands.

    python examples/2_own_checkpoint.py CONFIG.yml CHECKPOINT FOLDER

Without arguments it takes the demo model and a temporary folder. The settings are small: a minute on two cores.
"""

import sys
import tempfile
from pathlib import Path

from modiff_trt.core.kinds import Method
from modiff_trt.core.scales import save_scales
from modiff_trt.core.solvers import Solver
from modiff_trt.export.calibration.collecting import collect
from modiff_trt.export.calibration.pipeline import measure
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.runtime.backends.registry.options import load_model

ROOT = Path(__file__).resolve().parents[1]


def main(config: Path, ckpt: Path, folder: Path) -> None:
    network, checkpoint = load_model(config, ckpt)
    trajectories = collect(
        network,
        checkpoint,
        timesteps=10,
        solver=Solver(),
        num_samples=4,
        calib_steps=10,
        seed=1,
        batch_size=4,
        device="cpu",
        out=folder / "trajectories.safetensors",
    )
    ranges = measure(network, checkpoint, trajectories, batch_size=4, device="cpu")
    recipe = Recipe(method=Method.MODIFF, act_bits=6)
    scales = make_scales(network, checkpoint, trajectories, ranges=ranges, recipe=recipe)
    save_scales(folder / "scales.safetensors", scales)
    save_onnx(folder / "network.onnx", build_onnx(network, checkpoint, scales, dtype="fp32", scales_sha256=None))
    print(f"{folder / 'network.onnx'}: {len(scales.modulated)} modulated layers, {len(scales.rows)} passes an image")


if len(sys.argv) == 4:
    main(*map(Path, sys.argv[1:]))
else:
    with tempfile.TemporaryDirectory() as temporary:
        main(ROOT / "configs/demo.yml", ROOT / "calib_cache/demo/model.safetensors", Path(temporary))
