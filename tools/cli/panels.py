"""Groups of options in `--help`, in the order in which a user thinks of them. What is in no group stands under `Options`."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

PANELS = {
    "Network": ("config", "ckpt", "model", "weights", "context", "guidance"),
    "Inputs": (
        "trajectories",
        "scales",
        "auto_scales",
        "onnx",
        "plan",
        "plans",
        "samples",
        "reference",
        "same_noise",
        "noise",
        "bench",
        "evaluation",
        "costs",
        "costs_batch",
    ),
    "Output": ("out", "name", "shards", "grid", "plots", "external_data", "inline", "dtype", "layers", "profile"),
    "Images": ("num_samples", "seed", "seeds", "batch_size", "eta"),
    "Steps": ("timesteps", "solver", "spacing", "prediction", "clip_sample", "steps_offset", "final_alpha", "calib_steps"),
    "Method": (
        "preset",
        "method",
        "weight_bit",
        "act_bit",
        "edge_bit",
        "granularity",
        "split",
        "start",
        "dither",
        "modulate",
        "scale_method",
        "activation_method",
        "weight_scale_method",
        "percentile",
        "residuals",
    ),
    "Modes of layers": ("modes", "min_intensity", "max_loss", "target_speed"),
    "Search": ("rounding", "iterations", "search", "trial_images", "correct_bias"),
    "Where it runs": ("backend", "backends", "device", "runtime", "target", "compile_network"),
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


def grouped(stage: Callable[..., Any]) -> Callable[..., Any]:
    """The stage, with each of its options in its group."""
    hints = get_type_hints(stage, include_extras=True)
    stage.__annotations__ = {name: _in_panel(hint, _PANEL_OF.get(name)) for name, hint in hints.items()}
    return stage


def _in_panel(hint: Any, panel: str | None) -> Any:
    if get_origin(hint) is not Annotated or panel is None:
        return hint
    kind, *extras = get_args(hint)
    placed = [copy(extra) for extra in extras]
    for extra in placed:
        if isinstance(extra, OptionInfo):
            extra.rich_help_panel = panel
    return Annotated[kind, *placed]
