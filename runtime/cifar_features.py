"""FD-CIFAR: the features of a small CIFAR-10 classifier that ships with the project, for Frechet distances without a download.

Such a distance ranks image sets of CIFAR-10 like FID does, on another scale. It is not FID and is never called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import sha256
from modiff_trt.runtime.image_sets import Images

NAME = "fd-cifar"
SIZE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# name: (input channels, output channels); "pool" follows widening layers, pairs named res* add their input.
LAYERS = {
    "stem": (3, 64),
    "wide1": (64, 128),
    "res1a": (128, 128),
    "res1b": (128, 128),
    "wide2": (128, 256),
    "wide3": (256, 256),
    "res3a": (256, 256),
    "res3b": (256, 256),
}
FEATURES, CLASSES = 256, 10


def normalize(images: Tensor) -> Tensor:
    """uint8 [n, 32, 32, 3] to float32 [n, 3, 32, 32] as the classifier takes it."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def forward(x: Tensor, layer: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """(features [n, 256], logits [n, 10]) of normalized images. `layer` maps each name of LAYERS to a function that convolves
    (with whatever norm belongs to it), and `head` to the last one."""

    def apply(name: str, h: Tensor) -> Tensor:
        result: Tensor = layer[name](h)  # type: ignore[operator]
        return F.relu(result)

    h = apply("stem", x)
    h = F.max_pool2d(apply("wide1", h), 2)
    h = h + apply("res1b", apply("res1a", h))
    h = F.max_pool2d(apply("wide2", h), 2)
    h = F.max_pool2d(apply("wide3", h), 2)
    h = h + apply("res3b", apply("res3a", h))
    features = h.mean((2, 3))
    logits: Tensor = layer["head"](features)  # type: ignore[operator]
    return features, logits


class CifarFeatures:
    """The shipped classifier, batch norm folded into its convolutions."""

    name = NAME

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Raises InputError if the file is not a classifier of this shape."""
        try:
            params = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"classifier {path} cannot be read: {error}") from None
        expected: dict[str, tuple[int, ...]] = {f"{n}.weight": (out, c, 3, 3) for n, (c, out) in LAYERS.items()}
        expected |= {f"{name}.bias": (out,) for name, (_, out) in LAYERS.items()}
        expected |= {"head.weight": (CLASSES, FEATURES), "head.bias": (CLASSES,)}
        if {k: tuple(v.shape) for k, v in params.items()} != expected:
            raise InputError(f"{path} is not the FD-CIFAR classifier; install modiff-trt again, or train it anew")
        self.digest = sha256(path)
        self._device = device
        on_device = {k: v.float().to(device) for k, v in params.items()}
        self._layer: dict[str, object] = {
            name: lambda h, n=name: F.conv2d(h, on_device[f"{n}.weight"], on_device[f"{n}.bias"], padding=1) for name in LAYERS
        }
        self._layer["head"] = lambda h: F.linear(h, on_device["head.weight"], on_device["head.bias"])

    @torch.inference_mode()
    def __call__(self, images: Images) -> dict[str, np.ndarray]:
        """uint8 [n, 32, 32, 3] to {"features": [n, 256], "logits": [n, 10]}, float32. Raises InputError on other sizes."""
        if images.shape[1:] != (SIZE, SIZE, 3):
            raise InputError(f"FD-CIFAR is for images of 32 x 32, found {images.shape[1:3]}; use --features inception")
        features, logits = forward(normalize(torch.from_numpy(np.array(images)).to(self._device)), self._layer)
        return {"features": features.cpu().numpy(), "logits": logits.cpu().numpy()}
