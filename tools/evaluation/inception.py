"""Inception features for FID, sFID and the Inception Score, from pytorch-fid's network and weights."""

from __future__ import annotations

import io
import os
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.extras import install_command
from modiff_trt.core.files import digest_of, read_file
from modiff_trt.runtime.backends.torch_denoiser import full_precision
from modiff_trt.runtime.images.pictures import Images

VARIABLE = "MODIFF_TRT_INCEPTION"
FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE, CLASSES = 299, 1008
# Of mixed_6/conv, 17 x 17, as guided-diffusion defines sFID; in its order [17, 17, 7], or its own statistics would not fit.
SPATIAL_CHANNELS = 7
POOL, SPATIAL = 2048, 17 * 17 * SPATIAL_CHANNELS
RESIZES = ("torch", "tensorflow")


def weights_file(path: Path | None) -> Path:
    """The weights: `path`, $MODIFF_TRT_INCEPTION, torch's cache, or a download into it. Raises InputError if there are none."""
    named = path or (Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None)
    if named is not None:
        if not named.is_file():
            raise InputError(f"Inception weights {named} do not exist; they are {FILE} (SHA-256 {SHA256})")
        return named
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not cached.is_file():
        from pytorch_fid.inception import FID_WEIGHTS_URL

        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(cached), hash_prefix=SHA256)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"Inception weights cannot be downloaded ({reason}); put {FILE} (SHA-256 {SHA256}) at {cached}, "
                f"or name it with --inception or {VARIABLE}"
            ) from None
    return cached


def mend_torchvision() -> None:
    """torchvision from PyPI is built for CUDA; beside another build of torch its library does not load, and then its import
    fails for two operators that nothing here uses. Naming them lets the import through."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


# Operators are gone with the object that has named them.
_kept: list[torch.library.Library] = []


def build_network() -> Any:
    """torchvision's Inception v3 with pytorch-fid's changes, without weights. Raises InputError if either is absent."""
    try:
        mend_torchvision()
        import torchvision
        from pytorch_fid import inception as fid
    except ImportError:
        raise InputError(f"Inception features need pytorch-fid; {install_command('fid')}") from None
    except RuntimeError as error:  # a torchvision for another torch fails while it is imported
        raise InputError(
            f"torchvision does not fit this torch ({error}); install the torchvision of its version and build (CPU or CUDA)"
        ) from None
    network = torchvision.models.inception_v3(num_classes=CLASSES, aux_logits=False, weights=None, init_weights=False)
    for name, features in (("5b", 32), ("5c", 64), ("5d", 64)):
        channels = {"5b": 192, "5c": 256, "5d": 288}[name]
        setattr(network, f"Mixed_{name}", fid.FIDInceptionA(channels, pool_features=features))
    for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(network, f"Mixed_{name}", fid.FIDInceptionC(768, channels_7x7=channels))
    network.Mixed_7b, network.Mixed_7c = fid.FIDInceptionE_1(1280), fid.FIDInceptionE_2(2048)
    return network


def resize_tensorflow(x: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it, output pixel i at input position i * in / out: the resizing of the original FID code."""
    for dim in (2, 3):
        old = x.shape[dim]
        position = torch.arange(size, device=x.device, dtype=torch.float32) * (old / size)
        low = position.floor().long()
        high = (low + 1).clamp(max=old - 1)
        share = (position - low).view([-1 if d == dim else 1 for d in range(4)]).to(x.dtype)
        below, above = x.index_select(dim, low), x.index_select(dim, high)
        x = below + (above - below) * share
    return x


class InceptionFeatures:
    """pool3, the first 7 channels of mixed_6/conv, and logits without bias, all float32."""

    def __init__(self, weights: Path | None = None, device: str = "cpu", resize: str = "torch") -> None:
        """`resize`: `torch` as pytorch-fid does it, or `tensorflow` as the original code and torch-fidelity do.

        Raises InputError if a package or the weights are missing, or the file holds something else.
        """
        network = build_network()
        path = weights_file(weights)
        try:
            data = read_file(path, "Inception weights")
            network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path} does not hold Inception weights ({first[:100]}); they are {FILE} (SHA-256 {SHA256})"
            ) from None
        self.digest = digest_of(data)
        self.name = "inception" if resize == "torch" else "inception-tensorflow"
        self.published = self.digest == SHA256
        self._device, self._resize = device, resize
        self._network = network.eval().requires_grad_(False).to(device)
        self._found: dict[str, Tensor] = {}
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep("spatial"))
        self._network.avgpool.register_forward_hook(self._keep("pool"))

    def _keep(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            self._found[name] = output

        return hook

    @full_precision()
    @torch.inference_mode()
    def __call__(self, images: Images) -> dict[str, np.ndarray]:
        """uint8 [n, H, W, 3] to {"pool": [n, 2048], "spatial": [n, 2023], "logits": [n, 1008]}."""
        x = torch.from_numpy(np.array(images)).to(self._device).permute(0, 3, 1, 2).float()
        if self._resize == "torch":
            x = F.interpolate(x / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False) * 2 - 1
        else:
            x = (resize_tensorflow(x, SIZE) - 128) / 128
        self._network(x)
        pool = self._found["pool"].flatten(1)
        spatial = self._found["spatial"][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        logits = pool @ self._network.fc.weight.T
        return {k: v.cpu().numpy() for k, v in (("pool", pool), ("spatial", spatial), ("logits", logits))}
