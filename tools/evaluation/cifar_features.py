"""FD-CIFAR: the features of a small CIFAR-10 classifier that ships with the project, for Frechet distances without a download.

Such a distance ranks image sets of CIFAR-10 like FID does, on another scale. It is not FID and is never called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

from modiff_trt.core.errors import InputError, one_line
from modiff_trt.core.files import digest_of, read_file
from modiff_trt.runtime.backends.torch_denoiser import full_precision
from modiff_trt.runtime.images.pictures import Images

NAME = "fd-cifar"
# Of the file that ships: features of any other bytes would be other figures under the same name.
SHIPPED_SHA256 = "70b30161f00bf82a46c0876d9e1612a9b26b75c8f6ce1ffe8e3b3e2bdf43571b"
SIZE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# A residual network of three stages, 32, 16 and 8 pixels wide, with two blocks each.
WIDTHS = (96, 192, 320)
FEATURES, CLASSES = WIDTHS[-1], 10


def _layers() -> dict[str, tuple[int, int, int, int]]:
    """Convolutions by name: (input channels, output channels, kernel, stride). The first block of the later stages halves the
    image and has a shortcut of its own."""
    layers = {"stem": (3, WIDTHS[0], 3, 1)}
    for stage, width in enumerate(WIDTHS):
        before = WIDTHS[max(stage - 1, 0)]
        for block in range(2):
            into, stride = (before, 2 if stage else 1) if block == 0 else (width, 1)
            layers[f"{stage}.{block}.a"] = (into, width, 3, stride)
            layers[f"{stage}.{block}.b"] = (width, width, 3, 1)
            if into != width:
                layers[f"{stage}.{block}.short"] = (into, width, 1, stride)
    return layers


LAYERS = _layers()


def normalize(images: Tensor) -> Tensor:
    """uint8 [n, 32, 32, 3] to float32 [n, 3, 32, 32] as the classifier takes it."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def forward(x: Tensor, layer: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """(features [n, 320], logits [n, 10]) of normalized images. `layer` maps each name of LAYERS to a function that convolves
    (with whatever norm belongs to it), and `head` to the last one."""

    def apply(name: str, h: Tensor) -> Tensor:
        result: Tensor = layer[name](h)  # type: ignore[operator]
        return result

    h = F.relu(apply("stem", x))
    for stage in range(len(WIDTHS)):
        for block in range(2):
            at = f"{stage}.{block}"
            short = apply(f"{at}.short", h) if f"{at}.short" in LAYERS else h
            h = F.relu(short + apply(f"{at}.b", F.relu(apply(f"{at}.a", h))))
    features = h.mean((2, 3))
    logits: Tensor = layer["head"](features)  # type: ignore[operator]
    return features, logits


class CifarFeatures:
    """The shipped classifier: batch norm folded into its convolutions, weights in int8 with a scale for each output channel.

    Features and logits are the mean over an image and its mirror image.
    """

    name = NAME

    def __init__(self, path: Path, device: str = "cpu", expected: str | None = None) -> None:
        """Raises InputError if the file is not a classifier of this shape, or its SHA-256 is not the `expected` one."""
        data = read_file(path, "classifier")
        self.digest = digest_of(data)
        if expected is not None and self.digest != expected:
            raise InputError(f"{path} is not the classifier that came with this program (altered?); install modiff-trt again")
        try:
            params = load(data)
        except Exception as error:  # the reader raises nearly anything for damaged bytes
            raise InputError(f"classifier {path} cannot be read: {one_line(str(error))}") from None
        shapes: dict[str, tuple[int, ...]] = {"head.weight": (CLASSES, FEATURES), "head.bias": (CLASSES,)}
        for name, (c, out, kernel, _) in LAYERS.items():
            shapes |= {f"{name}.weight": (out, c, kernel, kernel), f"{name}.scale": (out,), f"{name}.bias": (out,)}
        if {k: tuple(v.shape) for k, v in params.items()} != shapes:
            raise InputError(f"{path} is not the FD-CIFAR classifier; install modiff-trt again, or train it anew")
        if not all(value.isfinite().all() for value in params.values()):
            raise InputError(f"classifier {path} has NaN or infinite values; train it again")
        self._device = device
        on_device = {k: v.float().to(device) for k, v in params.items()}
        self._layer: dict[str, object] = {}
        for name, (_, _, kernel, stride) in LAYERS.items():
            weight = on_device[f"{name}.weight"] * on_device[f"{name}.scale"][:, None, None, None]
            self._layer[name] = partial(
                F.conv2d, weight=weight, bias=on_device[f"{name}.bias"], stride=stride, padding=kernel // 2
            )
        self._layer["head"] = lambda h: F.linear(h, on_device["head.weight"], on_device["head.bias"])

    @full_precision()
    @torch.inference_mode()
    def __call__(self, images: Images) -> dict[str, np.ndarray]:
        """uint8 [n, 32, 32, 3] to {"features": [n, 320], "logits": [n, 10]}, float32. Raises InputError on other sizes."""
        if images.shape[1:] != (SIZE, SIZE, 3):
            raise InputError(f"FD-CIFAR is for images of 32 x 32, found {images.shape[1:3]}; use --features inception")
        x = normalize(torch.from_numpy(np.array(images)).to(self._device))
        both = [forward(view, self._layer) for view in (x, x.flip(3))]
        features, logits = ((a + b) / 2 for a, b in zip(*both, strict=True))
        return {"features": features.cpu().numpy(), "logits": logits.cpu().numpy()}
