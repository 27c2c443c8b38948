"""The baseline of speed for diffusers' networks: diffusers' own module in FP16, channels last, compiled, in a CUDA graph.

    python -m modiff_trt.tools.research.baseline --model sd15 --context sd15/prompts.npz --batch-sizes 2,16 --out baseline.json

Needs diffusers and an NVIDIA GPU. A batch is what the network sees: with guidance an image counts twice.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.networks.diffusers_folder import MODEL_CONFIG, STEM, UNET
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.research.refusals import refuses_bad_input

RUNS, PASSES, TIMESTEP = 15, 5, 500


@refuses_bad_input
def main(
    model: Annotated[Path, typer.Option(help="diffusers folder with a UNet")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    context: Annotated[Path | None, typer.Option(help=".npz with the network's prompts, by diffusers' names")] = None,
    batch_sizes: Annotated[str, typer.Option(help="comma-separated")] = "2,16",
) -> None:
    """Times diffusers' own network."""
    if not torch.cuda.is_available():
        raise InputError("the baseline is measured on an NVIDIA GPU, and this torch sees none")
    settings = json.loads((model / UNET / MODEL_CONFIG).read_text())
    result: dict[str, Any] = {"network": model.name, "milliseconds": {}, "runs": RUNS, "passes": PASSES} | provenance("cuda")
    given = {}
    if context is not None:
        with np.load(context) as archive:
            given = {name: archive[name] for name in archive.files if not name.startswith("negative_")}
    for batch in map(int, batch_sizes.split(",")):
        result["milliseconds"][str(batch)] = milliseconds(model, settings, given, batch)
        typer.echo(f"batch {batch}: {result['milliseconds'][str(batch)]:.2f} ms")
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def milliseconds(model: Path, settings: dict[str, Any], context: dict[str, Any], batch: int) -> float:
    """Of a pass, the median of RUNS measurements over PASSES passes."""
    import diffusers

    torch._dynamo.reset()
    network = getattr(diffusers, settings["_class_name"]).from_config(settings)
    weights = load_file(model / UNET / f"{STEM}.safetensors")
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    network.load_state_dict({key: value.reshape(shapes[key]) for key, value in weights.items()})
    network = network.cuda().half().eval().requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    forward: Callable[..., Any] = torch.compile(network, dynamic=False)
    size = settings["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(batch, settings.get("in_channels", 3), height, width, device="cuda").half()
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.tensor(TIMESTEP, device="cuda")
    lines = {name: _lines(value, batch) for name, value in context.items()}

    def call() -> Tensor:
        answer: Tensor = forward(x, t, **lines, return_dict=False)[0]
        return answer

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    times = []
    for _ in range(RUNS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(PASSES):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / PASSES)
    return float(statistics.median(times[1:]))


def _lines(value: Any, batch: int) -> Tensor:
    array = torch.from_numpy(np.repeat(np.asarray(value), batch, 0)).cuda()
    return array.half() if array.is_floating_point() else array


if __name__ == "__main__":
    typer.run(main)
