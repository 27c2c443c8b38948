"""Trains the classifier behind FD-CIFAR: how calib_cache/fd_cifar/classifier.safetensors was made.

    python -m modiff_trt.tools.research.train_classifier --images cifar-10-binary.tar.gz --out classifier.safetensors

About five minutes on a GPU. Prints the accuracy on the test images, and writes it into the file's metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.numpy import save_file
from torch import Tensor, nn

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.core.progress import progress_bar
from modiff_trt.networks.quantizers import minmax_weight_scale, quantize_weight
from modiff_trt.runtime.images.sets import READ_ERRORS, cifar_batches
from modiff_trt.tools.evaluation.cifar_features import CLASSES, FEATURES, LAYERS, CifarFeatures, forward, normalize
from modiff_trt.tools.research.refusals import refuses_bad_input

BATCH, PEAK_RATE, DECAY, SMOOTHING, EMA = 512, 0.4, 5e-4, 0.1, 0.998
MIXED = 0.5  # share of batches of which a part of every image is another image's
Labelled = tuple[np.ndarray, np.ndarray]


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = {
            name: nn.Sequential(nn.Conv2d(c, out, k, stride, k // 2, bias=False), nn.BatchNorm2d(out))
            for name, (c, out, k, stride) in LAYERS.items()
        }
        # A module's name may have no dots.
        self.parts = nn.ModuleDict({name.replace(".", "_"): module for name, module in layers.items()})
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return forward(x, {name: self.parts[name.replace(".", "_")] for name in LAYERS} | {"head": self.head})[1]

    def folded(self) -> dict[str, np.ndarray]:
        """Weights with batch norm folded in, int8 with a scale for each output channel; biases and the head in float16."""
        arrays = {}
        for name in LAYERS:
            conv: Any
            norm: Any
            conv, norm = self.parts[name.replace(".", "_")]  # type: ignore[misc]
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = (conv.weight * gain[:, None, None, None]).detach().float()
            scale = minmax_weight_scale(weight, 8)
            arrays[f"{name}.weight"] = quantize_weight(weight, scale, 8).to(torch.int8)
            arrays[f"{name}.scale"] = scale
            arrays[f"{name}.bias"] = (norm.bias - norm.running_mean * gain).half()
        arrays |= {f"head.{k}": v.half() for k, v in self.head.named_parameters()}
        return {k: v.detach().cpu().contiguous().numpy() for k, v in arrays.items()}


def load_labelled(path: Path) -> tuple[Labelled, Labelled]:
    """((images, labels) for training, the same for the test), uint8, from CIFAR-10's binary archive or an .npz with
    `images`, `labels`, `test_images` and `test_labels`. Raises InputError."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return (file["images"], file["labels"]), (file["test_images"], file["test_labels"])
        except (*READ_ERRORS, KeyError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
    both = []
    for prefix in ("data_batch", "test_batch"):
        parts = list(cifar_batches(path, prefix))
        both.append((np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])))
    return both[0], both[1]


def augment(x: Tensor) -> Tensor:
    """Random flip, and shift by up to 4 pixels; x [n, 3, 32, 32] normalized."""
    n, _, h, w = x.shape
    device = x.device
    x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
    dy, dx = torch.randint(0, 9, (2, n, 1), device=device)
    rows, columns = torch.arange(h, device=device) + dy, torch.arange(w, device=device) + dx
    x = F.pad(x, (4, 4, 4, 4), "reflect")
    index = torch.arange(n, device=device)[:, None, None]
    return x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_mix(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """(images with a rectangle of another one, that one's labels, the share of the own image): CutMix, arXiv 1905.04899."""
    h, w = x.shape[2:]
    share = (1 - torch.rand(()).item()) ** 0.5  # the rectangle's area is uniform
    tall, wide = round(h * share), round(w * share)
    top, left = int(torch.randint(0, h - tall + 1, ())), int(torch.randint(0, w - wide + 1, ()))
    other = torch.randperm(len(x), device=x.device)
    x = x.clone()
    x[:, :, top : top + tall, left : left + wide] = x[other, :, top : top + tall, left : left + wide]
    return x, labels[other], 1 - tall * wide / (h * w)


def train(train_set: Labelled, epochs: int, seed: int) -> _Network:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = _Network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    images, labels = (torch.from_numpy(np.ascontiguousarray(v)).to(device) for v in train_set)
    labels = labels.long()
    batch = min(BATCH, len(images))
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=0.2, final_div_factor=1e3)
    with progress_bar() as bar:
        task = bar.add_task("train", total=steps, unit="batches")
        for _ in range(epochs):
            order = torch.randperm(len(images), device=device)
            for begin in range(0, len(images) - batch + 1, batch):
                chosen = order[begin : begin + batch]
                x, own, others, share = augment(normalize(images[chosen])), labels[chosen], labels[chosen], 1.0
                if torch.rand(()).item() < MIXED:
                    x, others, share = cut_mix(x, own)
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    logits = model(x)
                loss = share * F.cross_entropy(logits.float(), own, label_smoothing=SMOOTHING)
                loss = loss + (1 - share) * F.cross_entropy(logits.float(), others, label_smoothing=SMOOTHING)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                mean.update_parameters(model)
                bar.advance(task)
        torch.optim.swa_utils.update_bn(_batches(images, batch), mean)
    averaged: Any = mean.module
    return averaged  # type: ignore[no-any-return]


def _batches(images: Tensor, size: int) -> list[Tensor]:
    return [normalize(images[i : i + size]) for i in range(0, len(images), size)]


def accuracy(path: Path, test_set: Labelled) -> float:
    """Share of test images that the classifier file names rightly."""
    features = CifarFeatures(path, "cuda" if torch.cuda.is_available() else "cpu")
    images, labels = test_set
    right = 0
    for i in range(0, len(images), 500):
        right += int((features(images[i : i + 500])["logits"].argmax(1) == labels[i : i + 500]).sum())
    return right / len(images)


@refuses_bad_input
def main(
    images: Annotated[Path, typer.Option(help="cifar-10-binary.tar.gz")],
    out: Annotated[Path, typer.Option(help="classifier to write (.safetensors)")],
    epochs: Annotated[int, typer.Option(help="passes over the training images")] = 120,
    seed: Annotated[int, typer.Option(help="seed of initialization, order and augmentation")] = 0,
) -> None:
    """Trains the FD-CIFAR classifier."""
    if epochs < 1:
        raise InputError("--epochs must be at least 1")
    train_set, test_set = load_labelled(images)
    arrays = train(train_set, epochs, seed).folded()
    meta = {"epochs": str(epochs), "seed": str(seed), "torch": torch.__version__}
    with atomic_path(out) as temporary:
        save_file(arrays, temporary, meta)
        found = accuracy(temporary, test_set)
        save_file(arrays, temporary, meta | {"test_accuracy": f"{found:.4f}"})
    typer.echo(f"{out}: {100 * found:.2f} % of {len(test_set[0])} test images, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
