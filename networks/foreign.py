"""Checkpoints and files of other projects, recognized by what they hold, so that a refusal can say what they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

READS = (
    "this program reads diffusers folders (--model), latent diffusion with its YAML, and DDIM checkpoints "
    "(keys like 'down.0.block.0.conv1.weight')"
)
CALIBRATE = "pass the float checkpoint as --ckpt and make scales with `modiff-trt calibrate`"
# What a file is, by what some of its keys begin with or contain; the first that fits counts.
BEGINS = {
    "transformer_blocks.": "a diffusion transformer",
    "map_layer": "a checkpoint of EDM",
    "all_modules.": "a checkpoint of score_sde",
    "x_embedder.": "a diffusion transformer (DiT)",
}
CONTAINS = {
    "weight_quantizer.": "a quantized checkpoint of the Q-Diffusion or MoDiff research code",
    "act_quantizer": "a quantized checkpoint of the Q-Diffusion or MoDiff research code",
}
CALIBRATION_KEYS = ({"xs", "ts"}, {"xs", "ts", "cs"})
TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02")


def recognize(keys: Iterable[str]) -> str | None:
    """What a state dict of these keys is and what to do with it, if it is one of another project's."""
    names = list(keys)
    for part, what in CONTAINS.items():
        if any(part in name for name in names):
            return f"this is {what}, whose scales are not read; {CALIBRATE}"
    if any(name.startswith("down_blocks.") for name in names):
        return "this is a diffusers UNet of another configuration; pass its folder as --model, for --config and --ckpt"
    if any(name.startswith(("input_blocks.", "diffusion_model.input_blocks.")) for name in names):
        return (
            "this is a network of CompVis' latent diffusion, or of OpenAI's guided-diffusion, which is not read; of the former "
            "pass its own YAML file as --config"
        )
    for start, what in BEGINS.items():
        if any(name.startswith(start) for name in names):
            return f"this is {what}, which is not read yet: {READS}"
    return None


def recognize_path(path: Path) -> str | None:
    """What a path given as a checkpoint is, if it is something of another project's that is no such file."""
    if path.is_dir():
        if any((path / name).is_file() for name in ("model_index.json", "config.json")) or (path / "unet").is_dir():
            return "is a diffusers folder; pass it as --model, in the place of --config and --ckpt"
        return "is a folder; pass the file of the weights in it"
    if path.suffix == ".pkl":
        return "is a pickle, as EDM and StyleGAN write them: it holds Python code, which is never executed; save a state dict"
    return None


def recognize_content(content: object) -> str | None:
    """What the content of a torch file is, if it holds the research code's calibration data."""
    if isinstance(content, dict) and set(content) in CALIBRATION_KEYS:
        return "holds calibration data of the research code, no weights; `modiff-trt collect` makes ours"
    return None


def recognize_bytes(data: bytes, maker: str) -> str | None:
    """What a file is that should hold arrays of ours; `maker` is the command that makes one."""
    if data.startswith(TORCH_MAGIC):
        return (
            f"is a torch file or an archive, as the research code writes them, and is not read here; make ours with `{maker}`"
        )
    return None
