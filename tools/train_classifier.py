"""Trains the classifier behind FD-CIFAR: how calib_cache/fd_cifar/classifier.safetensors was made.

    python -m modiff_trt.tools.train_classifier --images cifar-10-binary.tar.gz --out classifier.safetensors

About two minutes on a GPU. Prints the accuracy on the test images, and writes it into the file's metadata.
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

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import atomic_path
from modiff_trt.runtime.cifar_features import CLASSES, FEATURES, LAYERS, CifarFeatures, forward, normalize
from modiff_trt.runtime.image_sets import READ_ERRORS, cifar_batches
from modiff_trt.tools.progress import progress_bar
from modiff_trt.tools.refusals import refuses_bad_input

BATCH, PEAK_RATE, DECAY, SMOOTHING, CUTOUT = 512, 0.4, 5e-4, 0.1, 8
Labelled = tuple[np.ndarray, np.ndarray]


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = {
            name: nn.Sequential(nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
            for name, (c, out) in LAYERS.items()
        }
        self.layers = nn.ModuleDict({**layers, "head": nn.Linear(FEATURES, CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        return forward(x, self.layers)[1]  # type: ignore[arg-type]

    def folded(self) -> dict[str, np.ndarray]:
        """Weights and biases with batch norm folded in, float16."""
        arrays = {}
        for name in LAYERS:
            conv: Any
            norm: Any
            conv, norm = self.layers[name]  # type: ignore[misc]
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            arrays[f"{name}.weight"] = conv.weight * gain[:, None, None, None]
            arrays[f"{name}.bias"] = norm.bias - norm.running_mean * gain
        arrays |= {f"head.{k}": v for k, v in self.layers["head"].named_parameters()}
        return {k: v.detach().float().cpu().contiguous().numpy().astype(np.float16) for k, v in arrays.items()}


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
    """Random flip, shift by up to 4 pixels, and a square of 8 x 8 set to the mean; x [n, 3, 32, 32] normalized."""
    n, _, h, w = x.shape
    device = x.device
    x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
    dy, dx = torch.randint(0, 9, (2, n, 1), device=device)
    rows, columns = torch.arange(h, device=device) + dy, torch.arange(w, device=device) + dx
    x = F.pad(x, (4, 4, 4, 4), "reflect")
    index = torch.arange(n, device=device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    top, left = torch.randint(0, h - CUTOUT + 1, (2, n, 1), device=device)
    row, column = torch.arange(h, device=device), torch.arange(w, device=device)
    inside = ((row >= top) & (row < top + CUTOUT))[:, None, :, None] & ((column >= left) & (column < left + CUTOUT))[
        :, None, None
    ]
    return x.masked_fill(inside, 0.0)


def train(train_set: Labelled, epochs: int, seed: int) -> _Network:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = _Network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
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
                x = augment(normalize(images[chosen])).contiguous(memory_format=torch.channels_last)
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING)
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
    epochs: Annotated[int, typer.Option(help="passes over the training images")] = 60,
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
