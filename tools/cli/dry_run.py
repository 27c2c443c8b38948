"""What `quantize` will take: said before each stage, and by `--dry-run` for all, with what would be read and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from modiff_trt.core.progress import duration

if TYPE_CHECKING:
    from modiff_trt.core.context import Context
    from modiff_trt.networks.checkpoint import Checkpoint
    from modiff_trt.networks.operations import Network

# Times `collect`, as measured with the demo model and the CIFAR-10 network on a CPU (results/quantize_cpu.json has the latter).
SHARES = {"calibrate": 6.0, "report": 2.0}


def collect_seconds(network: Network, checkpoint: Checkpoint, context: Context, *, passes: int, device: str) -> float:
    """What `collect` takes here: a pass of one image in full precision, timed, times the images' passes."""
    from modiff_trt.runtime.backends.registry.guidance import guided
    from modiff_trt.runtime.backends.registry.trained import unquantized
    from modiff_trt.tools.bench.run import Load, run_passes

    denoiser = guided(unquantized(network, checkpoint.params, (500, 0), device=device), context)
    load = Load.of(network, context, 1)
    run_passes(denoiser, load, 1, device=device)
    return passes * run_passes(denoiser, load, 1, device=device)[0]


def takes(name: str, collect: float, *, learns_weights: bool) -> str:
    """What a stage is announced with: what it will take, after a `collect` of so many seconds."""
    if name not in SHARES:
        return ""
    more = ", and the learning of weights" if name == "calibrate" and learns_weights else ""
    return f": about {duration(collect * SHARES[name])}{more}"


def tell(read: Sequence[Path], stages: dict[str, tuple[Path, bool]], collect: float, *, learns_weights: bool) -> None:
    """Prints it. `stages` have the file that each writes, and whether it stands there already; `collect` is in seconds."""
    typer.echo(f"would read {', '.join(map(str, read))}")
    left = 0.0
    for name, (file, stands) in stages.items():
        seconds = collect * (1.0 if name == "collect" else SHARES.get(name, 0.0))
        if stands:
            typer.echo(f"{name}: {file} is there already")
            continue
        left += seconds
        about = takes(name, collect, learns_weights=learns_weights) or (f": about {duration(seconds)}" if seconds else "")
        typer.echo(f"{name}: would write {file}{about}")
    typer.echo(f"about {duration(left)} in all, by one pass timed here; nothing was written")
