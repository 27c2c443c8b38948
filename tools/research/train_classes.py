"""Trains a network with cross-attention on images and their classes: how the demo of guidance was made. Its projections around
transformer blocks must be linear (`use_linear_projection`).

    python -m modiff_trt.tools.research.train_classes --model calib_cache/demo_classes --images cifar10.npz --minutes 8

`--model` is a diffusers folder of a `UNet2DConditionModel` without weights, and with a scheduler. A class is a prompt of a few
tokens, which are learned with the network; so is the prompt that says nothing, which one image in ten is given (classifier-free
guidance, arXiv 2207.12598). Writes the EMA weights, in float16, and the prompts into the folder: `classes.npz` is a --context.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.numpy import save_file
from torch import Tensor

from modiff_trt.core.config import OptimConfig, TrainingConfig
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.networks.diffusers_folder import MODEL_CONFIG, STEM, UNET, read_settings
from modiff_trt.networks.module import PromptedUNet
from modiff_trt.tools.research.refusals import refuses_bad_input
from modiff_trt.tools.research.train_classifier import load_labelled
from modiff_trt.tools.research.training import device_of_training, fit, state_beside

PROMPTS = "classes.npz"
TOKENS, UNSAID = 4, 0.1
TRAINING = TrainingConfig(batch_size=256, ema_rate=0.9995)
OPTIM = OptimConfig(lr=1e-3, weight_decay=1e-4)


def train_classes(model: Path, images: np.ndarray, labels: np.ndarray, *, minutes: float, seed: int) -> Path:
    """Writes weights and prompts into the folder `model`; the path of the weights. Raises InputError."""
    config, _ = read_settings(model)
    a = config.architecture
    if not a.cross_channels or (a.height, a.width) != images.shape[1:3]:
        raise InputError(f"{model / MODEL_CONFIG} must be of a UNet2DConditionModel for images of {images.shape[1:3]}")
    out = (model / UNET if (model / UNET).is_dir() else model) / f"{STEM}.safetensors"
    device = device_of_training()
    torch.manual_seed(seed)
    nothing = int(labels.max()) + 1
    network = PromptedUNet(config, prompts=nothing + 1, tokens=TOKENS).to(device)
    forward = torch.compile(network) if device.type == "cuda" else network
    classes = torch.from_numpy(labels.astype(np.int64)).to(device)

    def predict(x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        unsaid = torch.rand(len(chosen), device=device) < UNSAID
        answer: Tensor = forward(x, t, torch.where(unsaid, nothing, classes[chosen]))
        return answer

    fitted = fit(network, predict, replace(config, training=TRAINING, optim=OPTIM), images, out, minutes=minutes)
    arrays = {name.removeprefix("unet."): value.float().cpu().contiguous().numpy() for name, value in fitted.weights.items()}
    prompts = arrays.pop("prompts")
    halves = {name: _plain(name, value).astype(np.float16) for name, value in arrays.items()}
    with atomic_path(model / PROMPTS) as temporary, temporary.open("wb") as file:
        np.savez(file, encoder_hidden_states=prompts[:nothing], negative_encoder_hidden_states=prompts[nothing])
    with atomic_path(out) as temporary:
        save_file(halves, temporary, fitted.meta | {"seed": str(seed)})
    state_beside(out).unlink(missing_ok=True)
    return out


def _plain(name: str, value: np.ndarray) -> np.ndarray:
    """A parameter as diffusers has it: its linear layers, which are convolutions here, have two axes."""
    linear = ".transformer_blocks." in name or ".proj_in." in name or ".proj_out." in name
    return value.reshape(value.shape[:2]) if linear and value.ndim == 4 else value


@refuses_bad_input
def main(
    model: Annotated[Path, typer.Option(help="diffusers folder to write into, with the settings of network and scheduler")],
    images: Annotated[Path, typer.Option(help="cifar-10-binary.tar.gz, or .npz with images, labels, test_images, test_labels")],
    minutes: Annotated[float, typer.Option(help="time to train for")] = 8.0,
    seed: Annotated[int, typer.Option(help="seed of initialization and batches")] = 0,
) -> None:
    """Trains a class-conditional UNet whose classes are prompts."""
    (pictures, labels), _ = load_labelled(images)
    out = train_classes(model, pictures, labels, minutes=minutes, seed=seed)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
