"""A diffusers folder of random weights, at the full width of a network that people have: for measurements of speed and memory,
which do not ask for trained ones.

    python -m modiff_trt.tools.research.random_model "Stable Diffusion 1.5" --size 64 --out sd15
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from modiff_trt.core.context import NEGATIVE, PROMPT, context_arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.networks.diffusers_folder import MODEL_CONFIG, STEM, UNET, configuration
from modiff_trt.networks.module import UNet
from modiff_trt.networks.operations import Network
from modiff_trt.networks.unet2d import trace
from modiff_trt.tools.research.layouts_study import NETWORKS, PROCESS, TOKENS
from modiff_trt.tools.research.refusals import refuses_bad_input

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": PROCESS["beta_start"],
    "beta_end": PROCESS["beta_end"],
    "beta_schedule": PROCESS["beta_schedule"],
    "num_train_timesteps": PROCESS["num_diffusion_timesteps"],
    "clip_sample": False,
    "prediction_type": "epsilon",
}


@refuses_bad_input
def main(
    name: Annotated[str, typer.Argument(help="one of the networks of layouts_study")],
    out: Annotated[
        Path, typer.Option(help="folder to write: unet, scheduler, and prompts.npz where the network takes prompts")
    ],
    size: Annotated[int | None, typer.Option(help="height and width of its input (the network's own)")] = None,
    seed: Annotated[int, typer.Option(help="seed of weights and prompts")] = 0,
) -> None:
    """Writes a network with random weights, in float16."""
    if name not in NETWORKS:
        raise InputError(f"no network is called '{name}'; known: {', '.join(NETWORKS)}")
    kind, settings = NETWORKS[name]
    settings = {"_class_name": kind, **settings} | ({"sample_size": size} if size is not None else {})
    config = configuration(json.loads(json.dumps(settings)), PROCESS, out)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        module = UNet(config)
    for folder in (UNET, "scheduler"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().half().cpu().contiguous() for key, value in module.named_parameters()}
    with atomic_path(out / UNET / f"{STEM}.safetensors") as temporary:
        save_file(weights, temporary)
    (out / UNET / MODEL_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=1) + "\n")
    write_prompts(trace(config), out / "prompts.npz", seed)
    typer.echo(f"{out}: {sum(w.numel() for w in weights.values()) / 1e6:.1f} M parameters")


def write_prompts(network: Network, path: Path, seed: int) -> None:
    """A random context of one line, with what guidance leads away from."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for name, array in context_arrays(network.config.architecture).items():
        shape = [1, *(TOKENS if isinstance(n, str) else n for n in array.shape)]
        arrays[name] = generator.integers(0, 10, shape) if array.integer else generator.standard_normal(shape, np.float32)
        if name == PROMPT:
            arrays[NEGATIVE + name] = 0.5 * generator.standard_normal(shape, np.float32)
    if arrays:
        np.savez(path, **arrays)


if __name__ == "__main__":
    typer.run(main)
