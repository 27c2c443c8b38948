"""Reads a diffusers folder: a UNet beside its scheduler, or a whole pipeline. diffusers itself is not needed.

The settings become a configuration of this network and a solver. What the network or the solvers cannot express is refused by
the setting's name and value. Nothing that a file pickles is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from modiff_trt.core.config import Config, stored_config
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.files import digest_of, read_file, read_json
from modiff_trt.core.kinds import FinalAlpha, Prediction, Resampling, SolverKind, Spacing
from modiff_trt.core.solvers import Solver
from modiff_trt.networks.checkpoint import Checkpoint, fitted, read_tensors
from modiff_trt.networks.operations import Network

INDEX, UNET, SCHEDULER = "model_index.json", "unet", "scheduler"
MODEL_CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
# Beside the UNet of a pipeline whose UNet works on latents.
AUTOENCODERS = ("vae", "vqvae")
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
# What diffusers takes where a file leaves a setting out, and the values of it that this network has.
ONLY: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "time_embedding_type": ("positional", ("positional",)),
    "mid_block_scale_factor": (1, (1,)),
    "class_embed_type": (None, (None,)),
    "center_input_sample": (False, (False,)),
    "act_fn": ("silu", ("silu", "swish")),
    "num_train_timesteps": (None, (None,)),
    "only_cross_attention": (False, (False,)),
    "mid_block_only_cross_attention": (None, (None, False)),
    "dual_cross_attention": (False, (False,)),
    "addition_embed_type": (None, (None, "text_time")),
    "addition_embed_type_num_heads": (64, (64,)),
    "encoder_hid_dim": (None, (None,)),
    "encoder_hid_dim_type": (None, (None,)),
    "resnet_skip_time_act": (False, (False,)),
    "resnet_out_scale_factor": (1.0, (1.0,)),
    "time_embedding_act_fn": (None, (None,)),
    "timestep_post_act": (None, (None,)),
    "time_cond_proj_dim": (None, (None,)),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "attention_type": ("default", ("default",)),
    "class_embeddings_concat": (False, (False,)),
    "cross_attention_norm": (None, (None,)),
}


@dataclass(frozen=True)
class Kind:
    """One of diffusers' networks: its middle, and its blocks. Of a block: whether it has attention, and how it resamples, or
    the setting that says so. Plain blocks have a convolution, whatever that setting says."""

    middle: str
    down: Mapping[str, tuple[bool, str | Resampling]]
    up: Mapping[str, tuple[bool, str | Resampling]]


PIXELS = Kind(
    "UNetMidBlock2D",
    {
        "DownBlock2D": (False, Resampling.CONV),
        "AttnDownBlock2D": (True, "downsample_type"),
        "ResnetDownsampleBlock2D": (False, Resampling.RESNET),
    },
    {
        "UpBlock2D": (False, Resampling.CONV),
        "AttnUpBlock2D": (True, "upsample_type"),
        "ResnetUpsampleBlock2D": (False, Resampling.RESNET),
    },
)
PROMPTED = Kind(
    "UNetMidBlock2DCrossAttn",
    {"DownBlock2D": (False, Resampling.CONV), "CrossAttnDownBlock2D": (True, Resampling.CONV)},
    {"UpBlock2D": (False, Resampling.CONV), "CrossAttnUpBlock2D": (True, Resampling.CONV)},
)
NETWORKS = {"UNet2DModel": PIXELS, "UNet2DConditionModel": PROMPTED}
RESAMPLING = {"conv": Resampling.CONV, "resnet": Resampling.RESNET}
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
# Names of attention's layers in files from before diffusers 0.17.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Folder:
    """What a folder says: the network's configuration with its diffusion process, the scheduler as a solver, and where the
    weights lie."""

    config: Config
    solver: Solver
    weights: Path


def read_folder(path: Path) -> Folder:
    """Raises InputError for what is no such folder, lacks a file, or asks for what this program does not have."""
    config, solver = read_settings(path)
    return Folder(config, solver, weights=_weights_file(_unet_folder(path)))


def read_settings(path: Path) -> tuple[Config, Solver]:
    """What a folder says beside its weights. Raises InputError."""
    if not path.is_dir():
        raise InputError(f"--model {path} is no folder; pass one that diffusers' save_pretrained wrote")
    unet = _unet_folder(path)
    if not (unet / MODEL_CONFIG).is_file():
        raise InputError(f"--model {path} has no {MODEL_CONFIG} of a UNet; pass a folder that diffusers' save_pretrained wrote")
    schedulers = (path / SCHEDULER / SCHEDULER_CONFIG, path / SCHEDULER_CONFIG, path.parent / SCHEDULER / SCHEDULER_CONFIG)
    scheduler = next((file for file in schedulers if file.is_file()), None)
    if scheduler is None:
        raise InputError(f"--model {path} has no {SCHEDULER_CONFIG}, which names the noise; pass the pipeline's folder")
    model = _settings(unet / MODEL_CONFIG)
    process = _settings(scheduler)
    diffusion, solver = _schedule(process, scheduler)
    config = configuration(model, diffusion, unet / MODEL_CONFIG)
    pipeline = path if unet != path else path.parent
    return replace(config, latent=_has_autoencoder(pipeline)), solver


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
    state: dict[str, Tensor] = {}
    digests = []
    for file in files:
        data = read_file(file, "checkpoint")
        digests.append(digest_of(data))
        state |= {_renamed(key): value for key, value in read_tensors(data, file).items()}
    params = fitted(state, network, folder.weights, names={key: key for key in network.parameters})
    return Checkpoint(params, digests[0] if len(digests) == 1 else digest_of("".join(digests).encode()), "")


def model_settings(path: Path) -> dict[str, Any]:
    """What a folder's UNet says of itself, as diffusers has it."""
    return _settings(_unet_folder(path) / MODEL_CONFIG)


def _unet_folder(path: Path) -> Path:
    return path / UNET if (path / UNET).is_dir() else path


def _has_autoencoder(pipeline: Path) -> bool:
    """Whether a pipeline has one, in its folder or by its index: a copy may lack the part that is not needed here."""
    index = pipeline / INDEX
    parts = read_json(index, "index of a pipeline") if index.is_file() else {}
    return any((isinstance(parts, dict) and part in parts) or (pipeline / part).is_dir() for part in AUTOENCODERS)


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


def configuration(settings: Mapping[str, Any], process: dict[str, Any], path: Path) -> Config:
    """The settings of a UNet, with a diffusion process as a configuration has it; `path` names their origin in errors. Raises
    InputError naming the first setting that this network cannot express."""
    name = settings["_class_name"]
    if name not in NETWORKS:
        raise InputError(f"{path}: {shown(name)} is no network of this program, which has {' and '.join(NETWORKS)}")
    kind = NETWORKS[name]
    for key, (default, values) in {**ONLY, "mid_block_type": (kind.middle, (kind.middle,))}.items():
        if settings.get(key, default) not in values:
            raise _refusal(path, key, settings.get(key, default))
    try:
        a = _architecture(settings, kind, path)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} lacks settings of a {name}, or damaged ones: {type(error).__name__}: {error}") from None
    if a["in_channels"] != a["out_channels"]:
        raise _refusal(path, "out_channels", a["out_channels"])
    if settings.get("attn_norm_num_groups") not in (None, a["groups"]):
        raise _refusal(path, "attn_norm_num_groups", settings["attn_norm_num_groups"])
    return stored_config({"architecture": a, "diffusion": process}, str(path))


def _architecture(settings: Mapping[str, Any], kind: Kind, path: Path) -> dict[str, Any]:
    """The settings as an `Architecture` has them. Raises what a damaged file makes of it, and InputError."""
    prompted = kind is PROMPTED
    widths = tuple(settings["block_out_channels"])
    levels = len(widths)

    def by_level(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, list | tuple) else (value,) * levels

    shift = settings.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise _refusal(path, "resnet_time_scale_shift", shift)
    down, down_sampling = _side(settings, "down_block_types", kind.down, path)
    up, up_sampling = _side(settings, "up_block_types", kind.up, path)
    size = settings["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    head = by_level(settings.get("attention_head_dim", 8))
    attends = [*down, True]
    if prompted:
        # There the setting of this name is the number of heads.
        heads = by_level(settings.get("num_attention_heads") or head)
        depth = by_level(settings.get("transformer_layers_per_block", 1))
        uneven = [wide % count for wide, count in zip(widths, heads, strict=True)]
    else:
        heads = tuple(wide // (of or wide) for wide, of in zip(widths, head, strict=True))
        depth = (0,) * levels
        uneven = [wide % (of or wide) for wide, of in zip(widths, head, strict=True)]
    if any(rest for rest, has in zip((*uneven, uneven[-1]), attends, strict=True) if has):
        raise _refusal(path, "attention_head_dim", settings.get("attention_head_dim", 8))
    up_depth = settings.get("reverse_transformer_layers_per_block")
    added = settings.get("addition_embed_type") == "text_time"
    return {
        "in_channels": settings.get("in_channels", 4 if prompted else 3),
        "out_channels": settings.get("out_channels", 4 if prompted else 3),
        "height": height,
        "width": width,
        "base": widths[0],
        "channels": widths,
        "layers": by_level(settings.get("layers_per_block", 2)),
        "down_heads": tuple(count * has for count, has in zip(heads, down, strict=True)),
        "mid_heads": heads[-1] if settings.get("add_attention", True) else 0,
        "up_heads": tuple(count * has for count, has in zip(heads[::-1], up, strict=True)),
        "down_sampling": down_sampling,
        "up_sampling": up_sampling,
        "down_padding": settings.get("downsample_padding", 1),
        "groups": settings.get("norm_num_groups", 32),
        "eps": settings.get("norm_eps", 1e-5),
        "scale_shift": shift == "scale_shift",
        "mid_norm": prompted or shift == "default" or settings.get("attn_norm_num_groups") is not None,
        "time_channels": settings.get("time_embedding_dim") or 4 * widths[0],
        "freq_shift": settings.get("freq_shift", 0),
        "flip_sin_to_cos": settings.get("flip_sin_to_cos", True),
        "down_depth": depth,
        "mid_depth": depth[-1],
        "up_depth": tuple(up_depth) if up_depth else depth[::-1],
        "cross_channels": settings.get("cross_attention_dim", 1280) if prompted else 0,
        "classes": settings.get("num_class_embeds") or 0,
        "added_channels": settings["projection_class_embeddings_input_dim"] if added else 0,
        "added_times": settings["addition_time_embed_dim"] if added else 0,
    }


def _side(
    settings: Mapping[str, Any], key: str, known: Mapping[str, tuple[bool, str | Resampling]], path: Path
) -> tuple[tuple[bool, ...], tuple[Resampling, ...]]:
    """(whether a block has attention, how it resamples) of each block of one side."""
    attention, resampling = [], []
    for kind in settings[key]:
        if kind not in known:
            raise _refusal(path, key, kind)
        has, how = known[kind]
        if not isinstance(how, Resampling):
            setting = settings.get(how, "conv")
            if setting not in RESAMPLING:
                raise _refusal(path, how, setting)
            how = RESAMPLING[setting]
        attention.append(has)
        resampling.append(how)
    return tuple(attention), tuple(resampling)


def _refusal(path: Path, key: str, value: Any) -> InputError:
    return InputError(f"{path}: '{key}' {shown(value)} is not supported")


def _weights_file(unet: Path) -> Path:
    found = next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if found is None:
        raise InputError(f"{unet} has no weights; it should have {WEIGHTS[0]}")
    return found


def _renamed(key: str) -> str:
    """A parameter's name as diffusers has it now."""
    module, _, leaf = key.rpartition(".")
    parent, _, last = module.rpartition(".")
    return f"{parent}.{OLD[last]}.{leaf}" if last in OLD and ".attentions." in f".{parent}." else key
