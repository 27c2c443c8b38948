"""Configurations from CompVis' YAML files of latent diffusion (arXiv 2112.10752) and Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modiff_trt.core.config import Architecture, Config, DiffusionConfig, check_config
from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.kinds import FinalAlpha, Prediction, Resampling, Spacing
from modiff_trt.core.solvers import Solver

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
PREDICTIONS = {"eps": Prediction.EPSILON, "v": Prediction.V, "x0": Prediction.SAMPLE}
# Their sampler begins at timestep 1, does not clip, and ends at the first timestep's alpha.
SAMPLER = Solver(spacing=Spacing.LEADING, steps_offset=1, final_alpha=FinalAlpha.FIRST, clip_sample=None)
# Keys of the network that must have one value, which is their own default, and those that change no answer.
ONLY = {
    "conv_resample": True,
    "dims": 2,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "num_heads_upsample": -1,
    "n_embed": None,
    "num_classes": None,
    "disable_self_attentions": None,
    "num_attention_blocks": None,
}
UNUSED = {
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "legacy",
    "image_size",
    "use_linear_in_transformer",
    "disable_middle_self_attn",
}
KNOWN = {
    *(*ONLY, *UNUSED),
    *("in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks", "channel_mult"),
    *("num_heads", "num_head_channels", "use_spatial_transformer", "transformer_depth", "context_dim", "use_scale_shift_norm"),
}
GROUPS, EPS = 32, 1e-5


def is_compvis(tree: Any) -> bool:
    """Whether a YAML file's content is a configuration of latent diffusion."""
    return isinstance(tree, dict) and isinstance(tree.get("model"), dict) and "params" in tree["model"]


def compvis_config(tree: Any, source: str) -> tuple[Config, Solver]:
    """The network with its diffusion process, and its own sampler. Raises InputError naming the first key that is missing,
    damaged, or asks for what this network does not have."""
    try:
        params = tree["model"]["params"]
        settings = params["unet_config"]["params"]
        target = params["unet_config"].get("target", UNET)
        if target != UNET:
            raise InputError(f"{source}: the network {shown(target)} is not supported; this program has {UNET}")
        a = _architecture(settings, params.get("image_size", settings["image_size"]), source)
        schedule = params.get("beta_schedule", "linear")
        if schedule != "linear":
            raise InputError(f"{source}: 'beta_schedule' {shown(schedule)} is not supported")
        # What CompVis calls linear is so in the roots.
        diffusion = DiffusionConfig(
            "quad", float(params["linear_start"]), float(params["linear_end"]), int(params.get("timesteps", 1000))
        )
        prediction = params.get("parameterization", "eps")
        if prediction not in PREDICTIONS:
            raise InputError(f"{source}: 'parameterization' {shown(prediction)} is not supported")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        what = f"{type(error).__name__}: {shown(str(error))}"
        raise InputError(f"{source} lacks settings of a latent diffusion model, or has damaged ones ({what})") from None
    config = Config(a, diffusion, latent="first_stage_config" in params)
    check_config(config, source)
    return config, replace(SAMPLER, prediction=PREDICTIONS[prediction])


def _architecture(settings: dict[str, Any], size: Any, source: str) -> Architecture:
    for key, value in settings.items():
        if key not in KNOWN:
            raise InputError(f"{source}: the network's key {shown(key)} is not known")
        if key in ONLY and value != ONLY[key]:
            raise InputError(f"{source}: '{key}' {shown(value)} is not supported")
    if settings.get("disable_middle_self_attn"):
        raise InputError(f"{source}: 'disable_middle_self_attn' is not supported")
    base, mult = int(settings["model_channels"]), [int(m) for m in settings["channel_mult"]]
    channels, levels = tuple(base * m for m in mult), len(mult)
    attends = [2**level in list(settings["attention_resolutions"]) for level in range(levels)]
    of_head = int(settings.get("num_head_channels", -1))
    heads = tuple(int(settings["num_heads"]) if of_head == -1 else wide // of_head for wide in channels)
    if of_head != -1 and any(
        wide % of_head for wide, has in zip((*channels, channels[-1]), (*attends, True), strict=True) if has
    ):
        raise InputError(f"{source}: 'num_head_channels' {of_head} does not divide the channels")
    prompted = bool(settings.get("use_spatial_transformer", False))
    depth = int(settings.get("transformer_depth", 1)) if prompted else 0
    down = tuple(count * has for count, has in zip(heads, attends, strict=True))
    context = settings.get("context_dim") if prompted else 0
    if not isinstance(context, int):
        raise InputError(f"{source}: 'use_spatial_transformer' needs 'context_dim', a number of channels")
    if settings["in_channels"] != settings["out_channels"]:
        raise InputError(f"{source}: 'out_channels' {shown(settings['out_channels'])} is not supported")
    layers = settings["num_res_blocks"]
    return Architecture(
        in_channels=int(settings["in_channels"]),
        out_channels=int(settings["out_channels"]),
        height=int(size),
        width=int(size),
        base=base,
        channels=channels,
        layers=tuple(int(n) for n in layers) if isinstance(layers, list) else (int(layers),) * levels,
        down_heads=down,
        mid_heads=heads[-1],
        up_heads=down[::-1],
        down_sampling=(Resampling.CONV,) * levels,
        up_sampling=(Resampling.CONV,) * levels,
        down_padding=1,
        groups=GROUPS,
        eps=EPS,
        scale_shift=bool(settings.get("use_scale_shift_norm", False)),
        mid_norm=True,
        time_channels=4 * base,
        freq_shift=0,
        flip_sin_to_cos=True,
        down_depth=(depth,) * levels,
        mid_depth=depth,
        up_depth=(depth,) * levels,
        cross_channels=context,
        classes=0,
        added_channels=0,
        added_times=0,
    )
