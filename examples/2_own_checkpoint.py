"""From a checkpoint of your own to an exported INT8 network and images, from Python.

    python examples/2_own_checkpoint.py CONFIG.yml CHECKPOINT FOLDER

Without arguments it takes the demo model and a temporary folder. The settings are small: a minute on two cores. Each function
has the options of the command of its name, as keywords.
"""

import sys
import tempfile
from pathlib import Path

from modiff_trt import calibrate, collect, denoiser, export_onnx, load_model, load_scales, sample

ROOT = Path(__file__).resolve().parents[1]


def main(config: Path, ckpt: Path, folder: Path) -> None:
    network = {"config": config, "ckpt": ckpt}
    trajectories, scales = folder / "trajectories.safetensors", folder / "scales.safetensors"
    collect(**network, timesteps=10, num_samples=4, batch_size=4, out=trajectories)
    calibrate(**network, trajectories=trajectories, act_bit=6, preset="fast", trial_images=1, out=scales)
    export_onnx(**network, scales=scales, out=folder / "network.onnx")
    model = load_model(**network)
    images = sample(denoiser(model, load_scales(scales, model)), 4)
    print(f"{folder / 'network.onnx'} is written; {len(images)} images {images.shape[1:]} by native INT8")


if len(sys.argv) == 4:
    main(*map(Path, sys.argv[1:]))
else:
    with tempfile.TemporaryDirectory() as temporary:
        main(ROOT / "configs/demo.yml", ROOT / "calib_cache/demo/model.safetensors", Path(temporary))
