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


# What each command's `--help` ends with.
NETWORK = "--config model.yml --ckpt model.ckpt"
EXAMPLES = {
    "demo": "--out out/demo",
    "quantize": f"{NETWORK} --timesteps 100 --engine rtx:sm89 --out c",
    "collect": f"{NETWORK} --timesteps 100 --num-samples 16 --out t.safetensors",
    "calibrate": f"{NETWORK} --trajectories t.safetensors --act-bit 6 --preset balanced --out s.safetensors",
    "inspect": "s.safetensors",
    "export": f"{NETWORK} --scales s.safetensors --dtype fp16 --out n.onnx",
    "sample": "--backend onnx --onnx n.onnx --num-samples 64 --seed 0 --out images",
    "evaluate": "--samples images --reference cifar-10-binary.tar.gz --features fd-cifar --out results.json",
    "bench": f"{NETWORK} --scales s.safetensors --device cuda --backends torch-fp16-compiled,native-modiff --out bench.json",
    "report": f"{NETWORK} --scales s.safetensors --out report.html",
    "build": "--onnx n.onnx --runtime rtx --target sm89 --max-batch 16 --out plans",
    "verify": "--onnx n.onnx --plan plans/n.plan",
    "engines": f"{NETWORK} --scales s.safetensors --batch-sizes 1,16 --out engines",
    "package": "--onnx n.onnx --out sampler",
}
