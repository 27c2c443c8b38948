"""Reads a diffusers folder: a `UNet2DModel` beside its scheduler, or a whole pipeline. diffusers itself is not needed.

The settings become a configuration of this network and a solver, and the weights take its parameter names. What this network or
these solvers cannot express is refused by the setting's name and value. Nothing that a file pickles is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modiff_trt.core.config import Config, config_from_dict
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import digest_of, read_file, read_json
from modiff_trt.core.kinds import FinalAlpha, Prediction, SolverKind, Spacing
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.checkpoint import Checkpoint, fitted, read_tensors
from modiff_trt.networks.unet import Network

INDEX, UNET, SCHEDULER = "model_index.json", "unet", "scheduler"
MODEL_CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
STEM = "diffusion_pytorch_model"
# In the order of preference; an index names the parts of a model in several files.
WEIGHTS = tuple(
    f"{STEM}.{end}" for end in ("safetensors", "safetensors.index.json", "fp16.safetensors", "bin", "bin.index.json")
)
BETAS = {"linear": "linear", "scaled_linear": "quad"}
KINDS = {
    "DDPMScheduler": SolverKind.DDIM,
    "DDIMScheduler": SolverKind.DDIM,
    "DPMSolverMultistepScheduler": SolverKind.DPMPP_2M,
}
SPACINGS = {"leading": Spacing.LEADING, "trailing": Spacing.TRAILING, "linspace": Spacing.LINSPACE}
PREDICTIONS = {"epsilon": Prediction.EPSILON, "v_prediction": Prediction.V, "sample": Prediction.SAMPLE}
# What diffusers takes where a file leaves a setting out, and the only value that this network has.
ONLY: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "norm_eps": (1e-5, (1e-6,)),
    "norm_num_groups": (32, (32,)),
    "attn_norm_num_groups": (None, (None, 32)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "downsample_padding": (1, (0,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "mid_block_scale_factor": (1, (1,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
    "center_input_sample": (False, (False,)),
    "act_fn": ("silu", ("silu", "swish")),
}
# Of a scheduler: settings that change the image and that a row table does not have.
PLAIN: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
}
# Part of a module's path in diffusers, and here. The second line is of files from before diffusers 0.17.
RESNET = {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
TOP = {
    "conv_norm_out": "norm_out",
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
}


@dataclass(frozen=True)
class Folder:
    """What a folder says: the network's configuration with its diffusion process, the scheduler as a solver, and where the
    weights lie."""

    config: Config
    solver: Solver
    weights: Path


def read_folder(path: Path) -> Folder:
    """Raises InputError for what is no such folder, lacks a file, or asks for what this program does not have."""
    if not path.is_dir():
        raise InputError(f"--model {path} is no folder; pass one that diffusers' save_pretrained wrote")
    unet = path / UNET if (path / UNET).is_dir() else path
    if not (unet / MODEL_CONFIG).is_file():
        raise InputError(f"--model {path} has no {MODEL_CONFIG} of a UNet; pass a folder that diffusers' save_pretrained wrote")
    schedulers = (path / SCHEDULER / SCHEDULER_CONFIG, path / SCHEDULER_CONFIG, path.parent / SCHEDULER / SCHEDULER_CONFIG)
    scheduler = next((file for file in schedulers if file.is_file()), None)
    if scheduler is None:
        raise InputError(f"--model {path} has no {SCHEDULER_CONFIG}, which names the noise; pass the pipeline's folder")
    model = _settings(unet / MODEL_CONFIG)
    process = _settings(scheduler)
    diffusion, solver = _schedule(process, scheduler)
    return Folder(_configuration(model, diffusion, unet / MODEL_CONFIG), solver, weights=_weights_file(unet))


def load_folder(folder: Folder, network: Network) -> Checkpoint:
    """The weights under the network's names. Raises InputError where they do not fit."""
    files = [folder.weights]
    if folder.weights.name.endswith(".index.json"):
        index = read_json(folder.weights, "index of weights")
        try:
            parts = sorted({str(part) for part in index["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{folder.weights} is no index of weights; copy the folder again") from None
        files = [folder.weights.parent / Path(part).name for part in parts]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing, which {folder.weights.name} names; copy the folder again")
    levels = len(network.config.model.ch_mult)
    state: dict[str, Tensor] = {}
    digests = []
    for file in files:
        data = read_file(file, "checkpoint")
        digests.append(digest_of(data))
        for key, value in read_tensors(data, file).items():
            name, value = _renamed(key, levels, folder.weights), value
            state[name] = value[:, :, None, None] if _is_linear(name, value) else value
    params = fitted(state, network, folder.weights)
    return Checkpoint(params, digests[0] if len(digests) == 1 else digest_of("".join(digests).encode()), "")


def _settings(path: Path) -> dict[str, Any]:
    found = read_json(path, "settings")
    if not isinstance(found, dict) or not isinstance(found.get("_class_name"), str):
        raise InputError(f"{path} was not written by diffusers: it has no '_class_name'")
    return found


def _schedule(settings: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], Solver]:
    """(the diffusion process as a configuration has it, the scheduler as a solver)."""
    name = settings["_class_name"]
    if name not in KINDS:
        raise InputError(
            f"{path}: {shown(name)} is no solver of this program, which has {', '.join(KINDS)}; "
            "save the pipeline with one of them (DDIMScheduler.from_config)"
        )
    for key, values in PLAIN.items():
        if key in settings and settings[key] not in values:
            raise _refusal(path, key, settings[key])
    betas = settings.get("beta_schedule", "linear")
    if betas not in BETAS:
        raise _refusal(path, "beta_schedule", betas)
    multistep = KINDS[name] != SolverKind.DDIM
    spacing = settings.get("timestep_spacing", "linspace" if multistep else "leading")
    prediction = settings.get("prediction_type", "epsilon")
    if spacing not in SPACINGS:
        raise _refusal(path, "timestep_spacing", spacing)
    if prediction not in PREDICTIONS:
        raise _refusal(path, "prediction_type", prediction)
    order = settings.get("solver_order", 2)
    if order not in (1, 2):
        raise _refusal(path, "solver_order", order)
    # diffusers' multistep solvers do not clip, but where `thresholding` asks for it.
    clips = settings.get("clip_sample", True) and not multistep
    offset = settings.get("steps_offset", 0) if SPACINGS[spacing] == Spacing.LEADING else 0
    to_one = settings.get("set_alpha_to_one", True) or multistep
    limit = settings.get("clip_sample_range", 1.0)
    if not isinstance(limit, int | float) or type(offset) is not int:
        raise InputError(f"{path}: 'clip_sample_range' and 'steps_offset' must be numbers")
    solver = Solver(
        KINDS[name],
        SPACINGS[spacing],
        PREDICTIONS[prediction],
        clip_sample=float(limit) if clips else None,
        steps_offset=offset,
        final_alpha=FinalAlpha.ONE if to_one else FinalAlpha.FIRST,
        order=order,
    )
    process = {
        "beta_schedule": BETAS[betas],
        "beta_start": settings.get("beta_start", 1e-4),
        "beta_end": settings.get("beta_end", 0.02),
        "num_diffusion_timesteps": settings.get("num_train_timesteps", 1000),
    }
    return process, solver


def _configuration(settings: Mapping[str, Any], process: dict[str, Any], path: Path) -> Config:
    if settings["_class_name"] != "UNet2DModel":
        raise InputError(f"{path}: {shown(settings['_class_name'])} is no network of this program, which has UNet2DModel")
    for key, (default, values) in ONLY.items():
        if settings.get(key, default) not in values:
            raise _refusal(path, key, settings.get(key, default))
    try:
        widths, down, up = (list(settings[key]) for key in ("block_out_channels", "down_block_types", "up_block_types"))
        size, base = settings["sample_size"], int(widths[0])
        channels, heads = settings.get("in_channels", 3), settings.get("attention_head_dim", 8)
        attended = [width for width, kind in zip(widths, down, strict=True) if kind == "AttnDownBlock2D"] + [widths[-1]]
        mirrored = ["AttnUpBlock2D" if kind == "AttnDownBlock2D" else "UpBlock2D" for kind in reversed(down)]
        uneven = [width for width in widths if width % base]
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} lacks settings of a UNet2DModel, or damaged ones: {type(error).__name__}: {error}") from None
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise _refusal(path, "sample_size", size)
        size = size[0]
    other = [kind for kind in down if kind not in ("DownBlock2D", "AttnDownBlock2D")]
    if other:
        raise _refusal(path, "down_block_types", other[0])
    if up != mirrored:
        raise _refusal(path, "up_block_types", up)
    if uneven:
        raise _refusal(path, "block_out_channels", widths)
    if heads is not None and any(width != heads for width in attended):
        raise _refusal(path, "attention_head_dim", heads)
    if settings.get("time_embedding_dim") not in (None, 4 * base):
        raise _refusal(path, "time_embedding_dim", settings["time_embedding_dim"])
    tree = {
        "data": {"image_size": size, "channels": channels},
        "model": {
            "in_channels": channels,
            "out_ch": settings.get("out_channels", 3),
            "ch": base,
            "ch_mult": [width // base for width in widths],
            "num_res_blocks": settings.get("layers_per_block", 2),
            "attn_resolutions": [size >> level for level, kind in enumerate(down) if kind == "AttnDownBlock2D"],
            "resamp_with_conv": True,
        },
        "diffusion": process,
    }
    return config_from_dict(tree, str(path))


def _refusal(path: Path, key: str, value: Any) -> InputError:
    return InputError(f"{path}: '{key}' {shown(value)} is not supported")


def _weights_file(unet: Path) -> Path:
    found = next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if found is None:
        raise InputError(f"{unet} has no weights; it should have {WEIGHTS[0]}")
    return found


def _renamed(key: str, levels: int, path: Path) -> str:
    """A parameter's name here."""
    name, _, leaf = key.rpartition(".")
    if name in TOP:
        return f"{TOP[name]}.{leaf}"
    parts = name.split(".")
    try:
        inside = ".".join(parts[3:]) if parts[0] == "mid_block" else ".".join(parts[4:])
        if parts[0] == "mid_block" and parts[1] == "resnets":
            return f"mid.block_{int(parts[2]) + 1}.{RESNET.get(inside, inside)}.{leaf}"
        if parts[0] == "mid_block" and parts[1] == "attentions":
            return f"mid.attn_1.{ATTENTION[inside]}.{leaf}"
        if parts[0] in ("down_blocks", "up_blocks"):
            side = parts[0].removesuffix("_blocks")
            # diffusers counts the levels of the way up from the smallest image.
            level = int(parts[1]) if side == "down" else levels - 1 - int(parts[1])
            if parts[2] == "resnets":
                return f"{side}.{level}.block.{int(parts[3])}.{RESNET.get(inside, inside)}.{leaf}"
            if parts[2] == "attentions":
                return f"{side}.{level}.attn.{int(parts[3])}.{ATTENTION[inside]}.{leaf}"
            if parts[2] in ("downsamplers", "upsamplers"):
                return f"{side}.{level}.{parts[2].removesuffix('rs')}.conv.{leaf}"
    except (KeyError, ValueError, IndexError):
        raise InputError(f"{path} has a parameter '{key}', which this network does not") from None
    return key


def _is_linear(name: str, value: Tensor) -> bool:
    """Whether it is an attention's linear layer, which is a 1x1 convolution here."""
    return value.ndim == 2 and "attn" in name
