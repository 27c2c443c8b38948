"""`modiff-trt engines`: every kind of engine of one network, built, checked against onnxruntime and timed, as one report.

What cannot run on a machine is named with the reason, so that the same command says on a machine without a GPU which plans
build, and on one with a GPU which of them is the fastest and whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path
from modiff_trt.core.scales import Scales
from modiff_trt.engines.build import BuildOptions, target_of
from modiff_trt.engines.onnx_network import OnnxNetwork, load_network
from modiff_trt.engines.plan_files import build_into, plan_path
from modiff_trt.engines.verifying import verify_plan
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Network
from modiff_trt.plugins.modulated_conv.tensorrt.library import Library
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.plan import load_plan
from modiff_trt.tools.bench.run import candidates, run_bench

PASSES = 8  # of the comparison with onnxruntime
BASELINE = "torch-fp16-compiled"
MARKDOWN, RESULT, TIMES = "engines.md", "engines.json", "times.json"


@dataclass(frozen=True)
class Kind:
    """An engine: what it is called in files and in text, and what it is made of."""

    name: str
    title: str
    quantized: bool = True
    modulated: bool = True
    plugin: bool = False

    @property
    def file(self) -> str:
        """The exported file it is built from, without its ending."""
        return "modiff" if self.modulated else self.name


KINDS = (
    Kind("fp16", "FP16", quantized=False, modulated=False),
    Kind("int8", "INT8", modulated=False),
    Kind("modiff-plugin", "INT8 + MoDiff, plugin", plugin=True),
    Kind("modiff-inlined", "INT8 + MoDiff, inlined"),
)


@dataclass(frozen=True)
class Subject:
    """The network that engines are made of, and what its images are given."""

    network: Network
    checkpoint: Checkpoint
    scales: Scales
    context: Context = NO_CONTEXT


def build_engine(subject: Subject, kind: Kind, folder: Path, *, library: Library, options: BuildOptions) -> dict[str, Any]:
    """Exports and builds one engine into `folder`, unless it stands there already, and returns what the report says of it.
    Raises InputError where it cannot be built."""
    onnx = folder / f"{kind.file}.onnx"
    network = _exported(subject, kind, onnx)
    path = plan_path(folder, kind.name, library, target=target_of(options))
    manifest = _standing(path, network, options)
    kept = manifest is not None
    if manifest is None:
        path, manifest = build_into(folder, kind.name, library, network=network, options=options)
    report = {name: value for name, value in manifest["report"].items() if name != "table"}
    return {"plan": path.name, "onnx": onnx.name, "bytes": path.stat().st_size, "kept": kept, "report": report} | {
        name: manifest[name] for name in ("plan_sha256", "onnx_sha256", "runtime", "version", "target")
    }


def _exported(subject: Subject, kind: Kind, path: Path) -> OnnxNetwork:
    """The exported file as this kind takes it; written unless it stands there."""
    scales = subject.scales if kind.quantized else None
    if scales is not None and not kind.modulated:
        scales = scales.without_modulation()
    expected = (subject.checkpoint.sha256, scales.file_sha256 if scales is not None else None)
    if path.exists():
        try:
            network = load_network(path, kind.plugin)
        except InputError:
            pass  # another version's, or damaged: written anew
        else:
            found = network.manifest
            if (found["checkpoint_sha256"], found["scales_sha256"]) == expected:
                return network
    model = build_onnx(
        subject.network, subject.checkpoint, scales, dtype="fp16", scales_sha256=expected[1], solver=subject.scales.solver
    )
    save_onnx(path, model)
    return load_network(path, kind.plugin)


def _standing(path: Path, network: OnnxNetwork, options: BuildOptions) -> Any:
    """The manifest of a plan that was built from this file with these options; None where there is none."""
    try:
        manifest = load_plan(path).manifest
    except InputError:
        return None
    same = manifest["onnx_sha256"] == network.sha256 and manifest["options"] == asdict(options)
    return manifest if same and manifest["plugin"] == network.plugin else None


def check_engine(
    entry: dict[str, Any], folder: Path, context: Context, *, batch: int, tolerance: float, on_pass: Callable[[], None]
) -> dict[str, Any]:
    """An engine against onnxruntime, pass by pass. Raises InputError where this machine cannot run it."""
    plan, model = load_plan(folder / entry["plan"]), load_onnx(folder / entry["onnx"])
    # A pass is compared, and guidance is around passes.
    alone = replace(context, guidance=None)
    verdict = verify_plan(plan, model, batch=batch, passes=PASSES, tolerance=tolerance, context=alone, on_pass=on_pass)
    first = verdict.first
    return {
        "equal": first is None,
        "passes": verdict.passes,
        "eps_error": verdict.eps_error,
        "tolerance": tolerance,
        "first_difference": None if first is None else asdict(first),
    }


def verdict(engines: dict[str, dict[str, Any]], batches: dict[str, Any]) -> str:
    """One line: which engine is the fastest at the largest batch, and whether it is right."""
    if not batches:
        return "no engine was timed on this machine"
    batch = max(batches, key=int)
    rows = batches[batch]
    timed = {name: rows[_row(entry)] for name, entry in engines.items() if "plan" in entry and _row(entry) in rows}
    if not timed:
        return "no engine was timed on this machine"
    ranked = sorted(timed, key=lambda name: timed[name]["microseconds"])
    title = {kind.name: kind.title for kind in KINDS}

    def said(name: str) -> str:
        row = timed[name]
        ratio = ""
        if BASELINE in rows:
            ratio = f", {rows[BASELINE]['microseconds'] / row['microseconds']:.2f}x PyTorch FP16 compiled"
        return f"{title[name]} ({row['microseconds'] / 1e3:.3g} ms a pass at batch {batch}{ratio})"

    right = [name for name in ranked if engines[name].get("check", {}).get("equal")]
    if ranked[0] in right:
        return f"fastest, and equal to onnxruntime: {said(ranked[0])}"
    checked = engines[ranked[0]].get("check", {})
    why = "NOT equal to onnxruntime" if checked.get("equal") is False else "not compared with onnxruntime"
    rest = f"; the fastest that is equal: {said(right[0])}" if right else ""
    return f"fastest, but {why}: {said(ranked[0])}{rest}"


def _row(entry: dict[str, Any]) -> str:
    """What `bench` calls the engine."""
    return f"tensorrt {Path(entry['plan']).stem}"


def write_markdown(path: Path, result: dict[str, Any]) -> None:
    """The report as text that can be posted."""
    engines, batches = result["engines"], result["times"].get("batches", {})
    machine = result["machine"].get("gpu") or f"{result['machine']['cores']} CPU cores, no GPU used"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    sizes = sorted(batches, key=int)
    lines = [
        f"# Engines of {result['config']}",
        "",
        f"**{result['verdict']}.**",
        "",
        f"{machine}; {versions}. `{result['command']}`",
        "",
        _line(
            ["engine", "MB", "layers", "INT8 of quantized", "against onnxruntime"]
            + [f"us/image at {size}" for size in sizes]
            + [f"ratio at {size}" for size in sizes]
        ),
        _line(["---"] + ["---:"] * (4 + 2 * len(sizes))),
    ]
    for kind in KINDS:
        entry = engines[kind.name]
        cells = [kind.title, *_built(entry), _checked(entry)]
        rows = [batches[size].get(_row(entry)) if "plan" in entry else None for size in sizes]
        cells += ["" if row is None else f"{row['microseconds_an_image']:.1f}" for row in rows]
        cells += [_ratio(batches[size], row) for size, row in zip(sizes, rows, strict=True)]
        lines.append(_line(cells))
    if sizes:
        rows = [batches[size].get(BASELINE) for size in sizes]
        cells = [
            "PyTorch FP16, compiled",
            "",
            "",
            "",
            "",
            *("" if r is None else f"{r['microseconds_an_image']:.1f}" for r in rows),
        ]
        lines.append(_line(cells + ["" if r is None else "1.00x" for r in rows]))
    reasons = [f"- {kind.title}: {why}" for kind in KINDS for why in engines[kind.name].get("not_run", [])]
    reasons += [f"- times: {result['times']['not_run']}"] if "not_run" in result["times"] else []
    lines += ["", "What did not run:", "", *reasons] if reasons else []
    digests = f"checkpoint {result['checkpoint_sha256'][:12]}, scales {result['scales_sha256'][:12]}"
    lines += ["", f"Made from {digests}. Every figure stands in `{RESULT}` beside this file.", ""]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _built(entry: dict[str, Any]) -> list[str]:
    """Megabytes, layers, and how many of the quantized layers are in INT8."""
    if "plan" not in entry:
        return ["not built", "", ""]
    report = entry["report"]
    if not report["told"]:
        return [f"{entry['bytes'] / 1e6:.1f}", "not told", ""]
    in_int8 = report["quantized_layers_in_int8"] + report["plugin_layers"]
    return [f"{entry['bytes'] / 1e6:.1f}", str(report["layers"]), f"{in_int8} of {report['quantized_layers']}"]


def _checked(entry: dict[str, Any]) -> str:
    if "check" not in entry:
        return "not run"
    check = entry["check"]
    if check["equal"]:
        return f"equal ({check['eps_error']:.1g} of eps, {check['passes']} passes)"
    first = check["first_difference"]
    return f"DIFFERENT: {first['output']} at pass {first['row']}"


def _ratio(rows: dict[str, Any], row: dict[str, Any] | None) -> str:
    if row is None or BASELINE not in rows:
        return ""
    return f"{rows[BASELINE]['microseconds'] / row['microseconds']:.2f}x"


def time_engines(
    subject: Subject,
    engines: dict[str, dict[str, Any]],
    folder: Path,
    *,
    device: str,
    batch_sizes: Sequence[int],
    runs: int,
    passes: int,
) -> dict[str, Any]:
    """The engines beside PyTorch's compiled FP16, interleaved. Raises InputError where none of them can run."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this torch sees no NVIDIA GPU")
    plans = [folder / entry["plan"] for entry in engines.values() if "plan" in entry]
    makes = candidates(
        subject.network,
        subject.checkpoint,
        subject.scales,
        device=device,
        names=[BASELINE],
        plans=plans,
        context=subject.context,
    )
    result = run_bench(
        subject.network,
        makes,
        batch_sizes,
        warmup=2,
        runs=runs,
        passes=passes,
        device=device,
        out=folder / TIMES,
        settings={},
        context=subject.context,
    )
    return {name: result[name] for name in ("batches", "not_run", "runs", "passes")}
