"""The README of a folder that `quantize` wrote: what was quantized, how good it is, and how to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.networks.operations import Network
from modiff_trt.networks.state_elements import state_elements
from modiff_trt.tools.report.data import title_of

# What each file is for.
FILES = {
    "trajectories.safetensors": "full-precision trajectories that the scales were found on",
    "scales.safetensors": "scales, modes and rounded weights: for `sample --backend native`, `export`, `report`, `inspect`",
    "network.onnx": "the quantized network in one file: for onnxruntime, `package` and `build`",
    "network-fp16.onnx": "the same in float16, which plans are built from",
    "report.html": "images, errors and layers: open it in a browser",
}


def model_card(
    name: str,
    network: Network,
    scales: Scales,
    stages: Mapping[str, Mapping[str, Any]],
    *,
    checkpoint: str,
    made: str,
    commands: Sequence[str],
    copies: int,
    has_pipeline: bool,
) -> str:
    """Markdown. `stages` are those of the record, `checkpoint` says whose weights they are, `made` with which command and when,
    `commands` what can be done next. The network sees each image in so many `copies`; `has_pipeline` says whether
    `ModiffPipeline` takes the folder."""
    modes = [layer.mode for layer in scales.layers.values()]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in Mode if mode in modes)
    state = copies * 2 * sum(state_elements(scales, network).values())
    facts = {
        "network": f"{network.parameter_count / 1e6:.1f} M parameters, {len(modes)} layers: {counts}",
        "checkpoint": f"{checkpoint}, SHA-256 `{scales.checkpoint_sha256[:16]}...`",
        "steps": f"`{scales.solver.describe(len(scales.rows.timesteps))}`; scales hold for these alone",
        "accuracy": str(stages["calibrate"].get("said") or "not measured"),
        "state": f"{state / 1e6:.1f} MB an image between passes, in float16",
        "made": made,
    }
    rows = [f"| {what} | {said} |" for what, said in facts.items()]
    files = [
        f"| `{stage['file']}` | {_purpose(stage)} | {stage['seconds']:g} | `{stage['sha256'][:16]}...` |"
        for stage in stages.values()
        if _purpose(stage)
    ]
    python = [
        "From Python, on onnxruntime:",
        "",
        "```python",
        "from modiff_trt.diffusers import ModiffPipeline",
        "",
        'pipe = ModiffPipeline.from_pretrained(".")',
        f"images = pipe(batch_size=4, num_inference_steps={len(scales.rows.timesteps)}).images",
        "```",
        "",
    ]
    lines = [
        f"# {name}, {title_of(scales)}",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
        "## Use it",
        "",
        *(f"    {command}" for command in commands),
        "",
        *(python if has_pipeline else []),
        "## Files",
        "",
        "| file | what it is | made in, s | SHA-256 |",
        "|---|---|---|---|",
        *files,
        "",
        "`quantization.json` records settings and digests; the same command goes on from there.",
    ]
    return "\n".join(lines) + "\n"


def _purpose(stage: Mapping[str, Any]) -> str:
    """What a stage's file is for; empty for one that needs no line."""
    if str(stage["file"]).endswith(".plan"):
        return f"TensorRT plan, {stage.get('said', '')}: for `sample --backend trt` and `package --plan`"
    return FILES.get(stage["file"], "")
