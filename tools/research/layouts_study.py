"""How near this network's answers are to diffusers', at the full width of networks that people have, with random weights.

    python -m modiff_trt.tools.research.layouts_study --out results/layouts.json

Each network is built by diffusers, in float32, and run by both programs on one image of noise. Latents and images are smaller
than the networks' own where `size` says so; widths, depths and heads are not. The file is written after each network, and the
same command goes on from there. The largest takes 12 GB of memory.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modiff_trt.core.context import context_arrays
from modiff_trt.core.files import atomic_path
from modiff_trt.networks.binding import bind
from modiff_trt.networks.checkpoint import fitted
from modiff_trt.networks.diffusers_folder import configuration
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.research.refusals import refuses_bad_input

PROCESS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000}
DDPM = {
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "layers_per_block": 2,
}
SIX_DOWN = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
SIX_UP = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
DDPM_256 = DDPM | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": SIX_DOWN,
    "up_block_types": SIX_UP,
}
LATENTS = {"sample_size": 32, "in_channels": 4, "out_channels": 4}
STABLE = LATENTS | {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
PIXELS, PROMPTED = "UNet2DModel", "UNet2DConditionModel"
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "google/ddpm-cifar10-32": (
        PIXELS,
        DDPM
        | {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "google/ddpm-celebahq-256": (PIXELS, DDPM_256),
    "google/ddpm-church-256": (PIXELS, DDPM_256),
    "LDM-4, unconditional": (
        PIXELS,
        {
            "sample_size": 64,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
            "layers_per_block": 2,
            "attention_head_dim": 32,
        },
    ),
    "LDM-8, unconditional": (
        PIXELS,
        LATENTS
        | {
            "block_out_channels": (192, 384, 384, 768, 768),
            "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 4,
            "up_block_types": ("AttnUpBlock2D",) * 4 + ("UpBlock2D",),
            "layers_per_block": 2,
            "attention_head_dim": 24,
        },
    ),
    "LDM-4 of ImageNet's classes": (
        PROMPTED,
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (192, 384, 576, 960),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
            "layers_per_block": 2,
            "cross_attention_dim": 512,
            "attention_head_dim": 1,
        },
    ),
    "Stable Diffusion 1.5": (PROMPTED, STABLE),
    "Stable Diffusion 2.1": (
        PROMPTED,
        STABLE | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "SDXL": (
        PROMPTED,
        LATENTS
        | {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "scale-shift, residual resampling": (
        PIXELS,
        {
            "sample_size": 64,
            "block_out_channels": (128, 256, 384),
            "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "num_class_embeds": 1000,
            "attention_head_dim": 64,
        },
    ),
    "odd widths, 16 groups, no square": (
        PIXELS,
        {
            "sample_size": (48, 32),
            "block_out_channels": (80, 144, 208),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 16,
            "attention_head_dim": 16,
        },
    ),
}
TOKENS = 77


@refuses_bad_input
def main(out: Annotated[Path, typer.Option(help="JSON file to write")]) -> None:
    """Compares this network's answers with diffusers', for networks that people have."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    rows = found.get("networks", {})
    for name, (kind, settings) in NETWORKS.items():
        if name in rows:
            continue
        rows[name] = compare(kind, settings)
        typer.echo(f"{name}: {rows[name]['largest_difference']:.1e} of {rows[name]['parameters'] / 1e6:.0f} M parameters")
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps({"networks": rows, **provenance()}, indent=1) + "\n")


def compare(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of both answers, relative to the largest answer, and what was compared."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**settings).eval()
    network = trace(configuration({"_class_name": kind, **dict(model.config)}, PROCESS, Path(kind)))
    params = fitted(model.state_dict(), network, Path(kind), names={key: key for key in network.parameters})
    x, t = torch.randn(1, *network.config.input_shape), torch.tensor([261])
    context = {}
    for name, array in context_arrays(network.config.architecture).items():
        size = [1, *(TOKENS if isinstance(n, str) else n for n in array.shape)]
        context[name] = torch.randint(0, 10, size) if array.integer else torch.randn(size)
    added = {key: context[key] for key in ("text_embeds", "time_ids") if key in context}
    given = {key: value for key, value in context.items() if key not in added} | ({"added_cond_kwargs": added} if added else {})
    with torch.no_grad():
        begin = time.perf_counter()
        theirs = model(x, t, **given).sample
        middle = time.perf_counter()
        ours = run_unet(network, params, x, bound=bind(network, params, t, context))
        end = time.perf_counter()
    return {
        "parameters": network.parameter_count,
        "layers": len(network.layers),
        "input": list(network.config.input_shape),
        "largest_difference": float((ours - theirs).abs().max() / theirs.abs().max()),
        "seconds": round(end - middle, 2),
        "diffusers_seconds": round(middle - begin, 2),
    }


if __name__ == "__main__":
    typer.run(main)
