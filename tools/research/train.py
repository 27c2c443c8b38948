"""Trains a diffusion UNet: how the demo model was made.

    python -m modiff_trt.tools.research.train --config configs/demo.yml --images cifar-10-binary.tar.gz \\
        --minutes 8 --out calib_cache/demo/model.safetensors

Writes the EMA weights in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.numpy import save_file
from torch import Tensor

from modiff_trt.core.config import Config
from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.core.files import atomic_path
from modiff_trt.networks.ddim_names import ddim_names
from modiff_trt.networks.module import UNet
from modiff_trt.runtime.images.sets import load_images
from modiff_trt.tools.research.refusals import refuses_bad_input
from modiff_trt.tools.research.training import device_of_training, fit, state_beside


def train(config: Config, images: np.ndarray, out: Path, minutes: float, seed: int) -> None:
    device = device_of_training()
    torch.manual_seed(seed)
    model = UNet(config).to(device)
    forward = torch.compile(model) if device.type == "cuda" else model

    def predict(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        answer: Tensor = forward(x, t)
        return answer

    fitted = fit(model, predict, config, images, out, minutes=minutes)
    # A DDIM configuration goes with a DDIM checkpoint.
    published = ddim_names(fitted.weights, len(config.architecture.channels))
    arrays = {published[k]: p.float().cpu().contiguous().numpy().astype(np.float16) for k, p in fitted.weights.items()}
    with atomic_path(out) as temporary:
        save_file(arrays, temporary, fitted.meta | {"seed": str(seed)})
    state_beside(out).unlink(missing_ok=True)


@refuses_bad_input
def main(
    config: Annotated[Path, typer.Option(help="DDIM configuration file")],
    images: Annotated[Path, typer.Option(help="folder of pictures, .npz of uint8 images, or cifar-10-binary.tar.gz")],
    out: Annotated[Path, typer.Option(help="where the EMA weights go (.safetensors)")],
    minutes: Annotated[float, typer.Option(help="time to train for")] = 8.0,
    seed: Annotated[int, typer.Option(help="seed of initialization and batches")] = 0,
) -> None:
    """Trains the UNet of a configuration on an image set."""
    settings = load_config(config)
    train(settings, load_images(images, settings.architecture.height), out, minutes=minutes, seed=seed)


if __name__ == "__main__":
    typer.run(main)
