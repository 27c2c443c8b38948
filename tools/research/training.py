"""Fitting a diffusion network: the loop that `train` and `train_classes` share.

Needs an NVIDIA GPU for any useful speed; runs on a CPU too. Interrupted, it goes on from the state file beside the output.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from modiff_trt.core.config import Config
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.core.schedule import alphas_cumprod

SAVE_SECONDS = 60.0
# What a network answers to noisy images [N, C, H, W] at timesteps [N], for training images of these indices [N].
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fitted:
    """The mean of the weights over the last passes (EMA), float32 on the device, and what a file says of how they were made."""

    weights: dict[str, Tensor]
    meta: dict[str, str]


def learning_rate(fraction: float, base: float) -> float:
    """Linear warm-up over the first 2 %, then cosine to a hundredth."""
    if fraction < 0.02:
        return base * fraction / 0.02
    return base * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))))


def noise_loss(predict: Predict, chosen: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """DDPM's simple loss (arXiv 2006.11239, eq. 14), with antithetic timesteps as DDIM's code draws them."""
    n, total = x0.shape[0], alpha_bar.shape[0]
    t = torch.randint(0, total, (n // 2 + 1,), device=x0.device)
    t = torch.cat([t, total - 1 - t])[:n]
    noise = torch.randn_like(x0)
    a = alpha_bar[t][:, None, None, None]
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=x0.is_cuda):
        predicted = predict(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, chosen)
    return F.mse_loss(predicted.float(), noise)


def device_of_training() -> torch.device:
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def state_beside(out: Path) -> Path:
    """Where the state of an interrupted training lies."""
    return out.with_suffix(".train-state.pt")


def fit(model: nn.Module, predict: Predict, config: Config, images: np.ndarray, out: Path, *, minutes: float) -> Fitted:
    """Fits `model` to images uint8 [N, H, W, C] with AdamW, as the configuration's training settings say; `predict` is what
    computes with it. The state file beside `out` is left until the caller has written that. Raises InputError."""
    training, optim = config.training, config.optim
    if training.dropout > 0:
        raise InputError("this trainer has no dropout; set model.dropout to 0.0 in the configuration")
    device = next(model.parameters()).device
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    ema = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(optim.beta1, 0.99), eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    step, spent = 0, 0.0
    state_file = state_beside(out)
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]

    def save_state() -> None:
        with atomic_path(state_file) as temporary:
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step,
                "spent": spent,
            }
            torch.save(content, temporary)

    data = torch.from_numpy(np.array(images)).to(device)
    alpha_bar = torch.from_numpy(alphas_cumprod(config.diffusion)).float().to(device)
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    budget = minutes * 60
    started = saved = time.monotonic()
    before = spent
    with Progress(*columns) as progress:
        task = progress.add_task("", total=int(budget), completed=int(spent))
        while spent < budget:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spent / budget, optim.lr)
            chosen = torch.randint(0, len(data), (training.batch_size,), device=device)
            x0 = data[chosen].permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            flip = torch.rand(len(x0), 1, 1, 1, device=device) < 0.5
            x0 = torch.where(flip, x0.flip(3), x0).contiguous(memory_format=torch.channels_last)
            loss = noise_loss(predict, chosen, x0, alpha_bar)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
            optimizer.step()
            step += 1
            decay = min(training.ema_rate, (1 + step) / (10 + step))
            with torch.no_grad():
                names = [k for k, _ in model.named_parameters()]
                torch._foreach_lerp_([ema[k] for k in names], [p.detach() for p in model.parameters()], 1 - decay)
            spent = before + time.monotonic() - started
            if step % 50 == 0:
                value = loss.item()
                if not math.isfinite(value):
                    raise InputError(f"training diverged at step {step} (loss {value}); lower optim.lr in the configuration")
                progress.update(task, completed=min(int(spent), int(budget)), description=f"step {step}  loss {value:.4f}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    save_state()
                    saved = time.monotonic()
    meta = {"steps": str(step), "batch": str(training.batch_size), "minutes": f"{spent / 60:.1f}"}
    return Fitted(ema, meta)
