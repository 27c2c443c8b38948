"""Trains a diffusion UNet: how the demo model was made.

    python -m modiff_trt.tools.research.train --config configs/demo.yml --images cifar-10-binary.tar.gz \\
        --minutes 8 --out calib_cache/demo/model.safetensors

Needs an NVIDIA GPU for any useful speed; runs on a CPU too. Writes the EMA weights in float16. Interrupted, it goes
on from the state file beside the output.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.numpy import save_file
from torch import Tensor

from modiff_trt.core.config import Config
from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.core.schedule import alphas_cumprod
from modiff_trt.networks.ddim_names import ddim_names
from modiff_trt.networks.module import UNet
from modiff_trt.runtime.images.sets import load_images
from modiff_trt.tools.research.refusals import refuses_bad_input

SAVE_SECONDS = 60.0


def learning_rate(fraction: float, base: float) -> float:
    """Linear warm-up over the first 2 %, then cosine to a hundredth."""
    if fraction < 0.02:
        return base * fraction / 0.02
    return base * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))))


def loss_fn(model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """DDPM's simple loss (arXiv 2006.11239, eq. 14), with antithetic timesteps as DDIM's code draws them."""
    n, total = x0.shape[0], alpha_bar.shape[0]
    t = torch.randint(0, total, (n // 2 + 1,), device=x0.device)
    t = torch.cat([t, total - 1 - t])[:n]
    noise = torch.randn_like(x0)
    a = alpha_bar[t][:, None, None, None]
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=x0.is_cuda):
        predicted = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t)
    return F.mse_loss(predicted.float(), noise)


def train(config: Config, images: np.ndarray, out: Path, minutes: float, seed: int) -> None:
    if config.training.dropout > 0:
        raise InputError("this trainer has no dropout; set model.dropout to 0.0 in the configuration")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    layout = torch.channels_last
    model = UNet(config).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    ema = {k: p.detach().clone() for k, p in model.named_parameters()}
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(optim.beta1, 0.99), eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    step, spent = 0, 0.0
    state_file = out.with_suffix(".train-state.pt")
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

    forward = torch.compile(model) if device.type == "cuda" else model
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
            batch = data[torch.randint(0, len(data), (config.training.batch_size,), device=device)]
            x0 = batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            flip = torch.rand(len(x0), 1, 1, 1, device=device) < 0.5
            x0 = torch.where(flip, x0.flip(3), x0).contiguous(memory_format=layout)
            loss = loss_fn(forward, x0, alpha_bar)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
            optimizer.step()
            step += 1
            decay = min(config.training.ema_rate, (1 + step) / (10 + step))
            with torch.no_grad():
                names = [k for k, _ in model.named_parameters()]
                torch._foreach_lerp_([ema[k] for k in names], [p.detach() for p in model.parameters()], 1 - decay)
            if step % 50 == 0:
                value = loss.item()
                if not math.isfinite(value):
                    raise InputError(f"training diverged at step {step} (loss {value}); lower optim.lr in the configuration")
                spent = before + time.monotonic() - started
                progress.update(task, completed=min(int(spent), int(budget)), description=f"step {step}  loss {value:.4f}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    save_state()
                    saved = time.monotonic()
    # A DDIM configuration goes with a DDIM checkpoint.
    published = ddim_names(ema, len(config.architecture.channels))
    arrays = {published[k]: p.float().cpu().contiguous().numpy().astype(np.float16) for k, p in ema.items()}
    meta = {"steps": str(step), "batch": str(config.training.batch_size), "minutes": f"{spent / 60:.1f}", "seed": str(seed)}
    with atomic_path(out) as temporary:
        save_file(arrays, temporary, meta)
    state_file.unlink(missing_ok=True)


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
