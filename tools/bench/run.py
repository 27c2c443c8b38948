"""`modiff-trt bench`: time of one pass and of whole trajectories, every backend in one process, interleaved.

A pass is the network, and with the device backends its DDIM update. Times are taken with CUDA events on a GPU (the clock
of the device), and with a monotonic clock on a CPU. `microseconds` is the median of `runs` measurements, each over `passes`
passes; p95 of a pass is over all passes. A backend that cannot run here is named with the reason.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modiff_trt.core.context import NO_CONTEXT, Arrays, Context
from modiff_trt.core.errors import InputError, is_out_of_memory
from modiff_trt.core.files import write_signed
from modiff_trt.core.kinds import Granularity
from modiff_trt.core.scales import Scales
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Network
from modiff_trt.runtime.backends.graphed_denoiser import GraphedDenoiser
from modiff_trt.runtime.backends.registry import exported, trained
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.tools.bench.table import not_run
from modiff_trt.tools.provenance import provenance

Make = Callable[[], Denoiser]


# Networks in floating point, the fastest first: what speed is compared with.
FLOATING = ("torch-fp16-compiled", "torch-fp32")


def candidates(
    network: Network,
    checkpoint: Checkpoint,
    scales: Scales,
    device: str,
    names: Sequence[str],
    plans: Sequence[Path] = (),
    auto: Scales | None = None,
    context: Context = NO_CONTEXT,
) -> dict[str, Make]:
    """The backends by name, in the order of `names` (`all` is every one), and a row for each plan, and for `auto`: scales whose
    modes were chosen by measurement. All with the guidance of `context`. Raises InputError for an unknown one. Whether one can
    run here shows when it is made."""
    params, steps = checkpoint.params, scales.rows.timesteps

    def native(chosen: Scales) -> Denoiser:
        return trained.native(network, params, chosen, device, guidance=context.guidance)

    def around(denoiser: Denoiser) -> Denoiser:
        return guided(denoiser, context)

    def engine(path: Path) -> Denoiser:
        from modiff_trt.runtime.backends.plan import load_plan

        plan = load_plan(path)
        if plan.manifest["network"]["checkpoint_sha256"] != checkpoint.sha256:
            raise InputError(f"{path} was built from another checkpoint than --ckpt")
        return around(exported.tensorrt(plan, steps))

    known: dict[str, Make] = {
        "torch-fp16-compiled": lambda: trained.compiled_fp16(network, params, steps, scales.solver, guidance=context.guidance),
        "torch-fp32": lambda: around(trained.unquantized(network, params, steps, device=device)),
        "torch-bf16": lambda: around(trained.unquantized(network, params, steps, device=device, dtype=torch.bfloat16)),
        "torch-sim": lambda: around(trained.simulated(network, params, scales, device=device)),
        "native-int8": lambda: native(scales.without_modulation()),
        "native-modiff": lambda: native(scales),
        "native-ltq-modiff": lambda: native(replace(scales, granularity=Granularity.TENSOR)),
        "onnxruntime-fp32": lambda: around(_onnxruntime(network, checkpoint, None, steps=steps, device=device)),
        "onnxruntime-int8": lambda: around(
            _onnxruntime(network, checkpoint, scales.without_modulation(), steps=steps, device=device)
        ),
        "onnxruntime-modiff": lambda: around(_onnxruntime(network, checkpoint, scales, steps=steps, device=device)),
    }
    if auto is not None:
        known["native-auto"] = lambda: native(auto)
    for plan in plans:
        known[f"tensorrt {plan.stem}"] = partial(engine, plan)
    if not plans:
        known["tensorrt"] = _no_plan
    wanted = list(known) if list(names) == ["all"] else list(names)
    for name in wanted:
        if name not in known:
            raise InputError(f"--backends: unknown '{name}'; known: all, {', '.join(known)}")
    # What has a file of its own needs no name.
    given = (name for name in known if (name.startswith("tensorrt ") or name == "native-auto") and name not in wanted)
    return {name: known[name] for name in [*wanted, *given]}


def _no_plan() -> Denoiser:
    raise InputError("no plan given: build some with `modiff-trt build` and pass them as --plans")


def _onnxruntime(
    network: Network, checkpoint: Checkpoint, scales: Scales | None, steps: tuple[int, ...], device: str
) -> Denoiser:
    """The exported network in onnxruntime, whose CPU kernels run the QDQ pattern in float."""
    from modiff_trt.export.onnx.network import build_onnx, save_onnx
    from modiff_trt.runtime.backends.onnx_denoiser import load_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        save_onnx(path, build_onnx(network, checkpoint, scales, dtype="fp32", scales_sha256=None))
        return exported.onnxruntime(load_onnx(path, device), steps, device)


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
    context: Context = NO_CONTEXT,
    floors: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Times every backend at every batch size, writes the JSON after each size, and returns it.

    Images have the lines of `context`. `floors` has for some backends the least microseconds an image and pass. Raises
    InputError if no backend can run."""
    result: dict[str, Any] = settings | provenance(device) | {"runs": runs, "passes": passes, "batches": {}, "not_run": {}}
    for batch in batch_sizes:
        load = Load.of(network, context, batch)
        ready: dict[str, tuple[Denoiser, int]] = {}
        for name, make in makes.items():
            before, allocated = _memory(device), _allocated(device)
            try:
                denoiser = make()
                run_passes(denoiser, load, max(warmup, 1), device=device)
            except (InputError, RuntimeError) as error:  # a full memory, or a compiler that fails, is one backend's matter
                why = f"the memory is full at batch {batch}" if is_out_of_memory(error) else str(error)
                result["not_run"].setdefault(name, {})[str(batch)] = " ".join(why.split())[:300]
                continue
            # An eager backend's temporaries show in the peak, a CUDA graph's in the memory that it reserves.
            peak = torch.cuda.max_memory_allocated() - allocated if device == "cuda" else 0
            ready[name] = (denoiser, max(_memory(device) - before, peak))
            del denoiser
        if not ready:
            raise InputError("no backend can run here: " + "; ".join(not_run(result)))
        seconds: dict[str, list[list[float]]] = {name: [] for name in ready}
        timed = whole_intervals(passes, [denoiser for denoiser, _ in ready.values()])
        for _ in range(runs):
            for name, (denoiser, _) in ready.items():
                seconds[name].append(run_passes(denoiser, load, timed, device=device))
        del denoiser
        result["passes"] = max(len(run[0]) for run in seconds.values())  # fewer where a trajectory is shorter
        rows = {}
        for name in list(ready):
            denoiser, memory = ready.pop(name)
            rows[name] = _row(denoiser, seconds[name], batch, memory=memory, floor=(floors or {}).get(name))
            del denoiser
        result["batches"][str(batch)] = rows
        write_signed(out, result)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


def whole_intervals(passes: int, denoisers: Sequence[Denoiser]) -> int:
    """`passes`, rounded up so that each has its share of what is computed every so many passes. A trajectory of 100 has three
    refreshes and is charged four: after the last pass nothing is due."""
    every = [d.refresh_every for d in denoisers if isinstance(d, GraphedDenoiser) and d.refresh_every]
    return passes + -passes % max(every, default=1)


def _row(denoiser: Denoiser, seconds: list[list[float]], batch: int, memory: int, floor: float | None) -> dict[str, Any]:
    """One backend at one batch size; `seconds` of every pass of every run."""
    means = [statistics.fmean(run) for run in seconds]
    median, rows = statistics.median(means), len(denoiser.rows)
    row: dict[str, Any] = {
        "microseconds": median * 1e6,
        "microseconds_all": [mean * 1e6 for mean in means],
        "microseconds_p95": float(np.percentile(np.concatenate(seconds), 95)) * 1e6,
        "microseconds_an_image": median * 1e6 / batch,
        "trajectory_seconds": median * rows,
        "trajectory_seconds_p95": float(np.percentile(means, 95)) * rows,
        "images_a_second": batch / (median * rows),
        "passes_a_trajectory": rows,
        "memory_bytes": memory,
        "state_bytes_an_image": sum(info.nbytes for info in denoiser.state_info),
    }
    if floor is not None:
        row |= {"floor_microseconds_an_image": floor, "share_of_floor": floor / row["microseconds_an_image"]}
    return row


def _memory(device: str) -> int:
    """Device memory that is in use once nothing is cached: a backend's own, with its CUDA graph's pool."""
    if device != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _allocated(device: str) -> int:
    """Bytes that tensors hold now; the peak counts from here."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def baselines(result: dict[str, Any]) -> dict[int, float]:
    """Microseconds an image and pass of the fastest kind of floating-point network that a result has, by batch size."""
    found = {}
    for batch, rows in result["batches"].items():
        row = next((rows[name] for name in FLOATING if name in rows), None)
        if row is not None:
            found[int(batch)] = float(row["microseconds_an_image"])
    return found


@dataclass(frozen=True)
class Load:
    """The images of a measurement: noise [N, C, H, W], and their lines of a context."""

    x: np.ndarray[Any, Any]
    lines: Arrays

    @classmethod
    def of(cls, network: Network, context: Context, batch: int) -> Load:
        return cls(ImageNoise(0, range(batch), network.config.input_shape).draw(), context.of(range(batch)))


def run_passes(denoiser: Denoiser, load: Load, passes: int, device: str) -> list[float]:
    """Seconds of each pass, from the start of a trajectory."""
    passes = min(passes, len(denoiser.rows))
    if isinstance(denoiser, GraphedDenoiser):
        steps: Callable[[int], Any] = lambda row: denoiser.step()  # noqa: E731
        denoiser.begin(load.x, load.lines)
    else:
        denoiser.reset(len(load.x), load.lines)
        on_device = denoiser.from_host(load.x)
        steps = lambda row: denoiser(on_device, row)  # noqa: E731
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for row in range(passes):
            steps(row)
            events[row + 1].record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    times = [time.perf_counter()]
    for row in range(passes):
        steps(row)
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def native_floors(
    network: Network, scales: Scales, device: str, names: Iterable[str], *, auto: Scales | None = None, copies: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """(ceilings, least microseconds an image and pass of the native backends among `names`), by what this GPU reaches now;
    empty where none of them can run. The network sees each image in so many `copies`."""
    chosen = {"native-modiff": scales, "native-int8": scales.without_modulation()} | ({"native-auto": auto} if auto else {})
    if device != "cuda" or not chosen.keys() & set(names):
        return {}, {}
    from modiff_trt.runtime.backends.native.cuda_kernels import check_gpu

    try:
        check_gpu()
    except InputError:
        return {}, {}  # why, says the backend's own row
    from modiff_trt.runtime.backends.native.floors import pass_floor, work
    from modiff_trt.tools.bench.profiling import ceilings

    reached = ceilings()
    return reached, {name: copies * pass_floor(work(network, s), reached) for name, s in chosen.items()}


def add_profiles(
    network: Network,
    scales: Scales,
    make: Make,
    batch_sizes: Sequence[int],
    *,
    context: Context,
    result: dict[str, Any],
    out: Path,
) -> None:
    """Adds the native backend's time by class of kernel to a result, and writes it again."""
    from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
    from modiff_trt.runtime.backends.native.floors import floors, work
    from modiff_trt.tools.bench.profiling import profile

    denoiser, least = make(), floors(work(network, scales), result["ceilings"])
    assert isinstance(denoiser, NativeDenoiser)
    result["profiles"] = {str(batch): profile(denoiser, least, context, batch=batch) for batch in batch_sizes}
    write_signed(out, result)
