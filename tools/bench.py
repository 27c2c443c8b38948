"""`modiff-trt bench`: time of one pass and of whole trajectories, every backend in one process, interleaved.

A pass is the network, and with the device backends its DDIM update. Times are taken with CUDA events on a GPU (the clock
of the device), and with a monotonic clock on a CPU. `microseconds` is the median of `runs` measurements, each over `passes`
passes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from modiff_trt.export.checkpoint import Checkpoint
from modiff_trt.export.errors import InputError
from modiff_trt.export.files import write_json
from modiff_trt.export.scales import Scales
from modiff_trt.export.unet import Network
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.graphed_denoiser import GraphedDenoiser
from modiff_trt.runtime.noise import ImageNoise
from modiff_trt.tools.provenance import provenance

Make = Callable[[], Denoiser]


def candidates(network: Network, checkpoint: Checkpoint, scales: Scales, device: str, names: Sequence[str]) -> dict[str, Make]:
    """The backends by name, in the order of `names`. Raises InputError for an unknown one."""
    from modiff_trt.runtime.compiled_denoiser import CompiledDenoiser
    from modiff_trt.runtime.native_denoiser import NativeDenoiser
    from modiff_trt.runtime.native_layers import check_scales
    from modiff_trt.runtime.torch_denoiser import SimDenoiser, TorchDenoiser
    from modiff_trt.tools.load import native_kernels

    params, steps = checkpoint.params, scales.rows.timesteps
    stateless = scales.without_modulation()
    known: dict[str, Make] = {
        "torch-fp32": lambda: TorchDenoiser(network, params, steps, device),
        "torch-fp16-compiled": lambda: CompiledDenoiser(network, params, steps),
        "torch-sim": lambda: SimDenoiser(network, params, scales, device),
        "native-int8": lambda: NativeDenoiser(network, params, stateless, native_kernels(device), device),
        "native-modiff": lambda: NativeDenoiser(network, params, scales, native_kernels(device), device),
    }
    for name in names:
        if name not in known:
            raise InputError(f"--backends: unknown '{name}'; known: {', '.join(known)}")
        if name == "torch-fp16-compiled" and device != "cuda":
            raise InputError("--backends: torch-fp16-compiled is for --device cuda")
        if name.startswith("native"):
            check_scales(scales)
    return {name: known[name] for name in names}


def run_bench(
    network: Network,
    makes: dict[str, Make],
    batch_sizes: Sequence[int],
    *,
    warmup: int,
    runs: int,
    passes: int,
    device: str,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Times every backend at every batch size, writes the JSON after each size, and returns it."""
    result: dict[str, Any] = settings | provenance(device) | {"runs": runs, "passes": passes, "batches": {}}
    for batch in batch_sizes:
        x = ImageNoise(0, range(batch), network.config.input_shape).draw()
        ready: dict[str, tuple[Denoiser, int]] = {}
        rows: dict[str, Any] = {}
        for name, make in makes.items():
            before = _memory(device)
            ready[name] = (make(), 0)
            _run(ready[name][0], x, max(warmup, 1), device)
            ready[name] = (ready[name][0], _memory(device) - before)
        seconds: dict[str, list[float]] = {name: [] for name in makes}
        for _ in range(runs):
            for name, (denoiser, _) in ready.items():
                seconds[name].append(_run(denoiser, x, passes, device))
        for name in list(ready):
            denoiser, memory = ready.pop(name)
            median = statistics.median(seconds[name])
            rows[name] = {
                "microseconds": median * 1e6,
                "microseconds_all": [s * 1e6 for s in seconds[name]],
                "microseconds_an_image": median * 1e6 / batch,
                "images_a_second": batch / (median * len(denoiser.rows)),
                "passes_a_trajectory": len(denoiser.rows),
                "memory_bytes": memory,
                "state_bytes_an_image": sum(info.nbytes for info in denoiser.state_info),
            }
            del denoiser
        result["batches"][str(batch)] = rows
        write_json(out, result)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


def _memory(device: str) -> int:
    """Device memory that is in use once nothing is cached: a backend's own, with its CUDA graph's pool."""
    if device != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _run(denoiser: Denoiser, x: np.ndarray[Any, Any], passes: int, device: str) -> float:
    """Seconds a pass, from the start of a trajectory."""
    passes = min(passes, len(denoiser.rows))
    if isinstance(denoiser, GraphedDenoiser):
        steps: Callable[[int], Any] = lambda row: denoiser.step()  # noqa: E731
        denoiser.begin(x)
        denoiser.step()  # captures where it has not been
        denoiser.begin(x)
    else:
        denoiser.reset(len(x))
        on_device = denoiser.from_host(x)
        steps = lambda row: denoiser(on_device, row)  # noqa: E731
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for row in range(passes):
            steps(row)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / passes
    start = time.perf_counter()
    for row in range(passes):
        steps(row)
    return (time.perf_counter() - start) / passes


def add_profiles(
    network: Network, scales: Scales, make: Make, batch_sizes: Sequence[int], result: dict[str, Any], out: Path
) -> None:
    """Adds the native backend's time by class of kernel to a result, and writes it again."""
    from modiff_trt.runtime.native_denoiser import NativeDenoiser
    from modiff_trt.tools.profiling import profile

    denoiser = make()
    assert isinstance(denoiser, NativeDenoiser)
    result["profiles"] = {str(batch): profile(denoiser, network, scales, batch) for batch in batch_sizes}
    write_json(out, result)


def print_bench(result: dict[str, Any]) -> None:
    """One line for each batch size and backend, with its ratio to the first backend."""
    table = Table(title=f"{result['machine'].get('gpu') or result['machine']['processor']}, one pass")
    for heading in ("batch", "backend", "us", "us an image", "images/s", "ratio", "memory, GB", "state, MB an image"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for batch, rows in result["batches"].items():
        first = next(iter(rows.values()))["microseconds"]
        for name, row in rows.items():
            table.add_row(
                batch,
                name,
                f"{row['microseconds']:.0f}",
                f"{row['microseconds_an_image']:.1f}",
                f"{row['images_a_second']:.1f}",
                f"{first / row['microseconds']:.2f}x",
                f"{row['memory_bytes'] / 1e9:.2f}",
                f"{row['state_bytes_an_image'] / 1e6:.1f}",
            )
    Console().print(table)
