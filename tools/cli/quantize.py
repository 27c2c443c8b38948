"""`modiff-trt quantize`: from a checkpoint to a folder with everything that deploying it needs, in one command."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import Modes
from modiff_trt.tools.cli.calibrate import INTENSITY, calibrate
from modiff_trt.tools.cli.options import (
    BatchSize,
    Ckpt,
    ClipSample,
    Config,
    ContextFile,
    Device,
    FinalAlphaName,
    Guidance,
    Model,
    PredictionName,
    SolverName,
    SpacingName,
    StepsOffset,
    Weights,
)
from modiff_trt.tools.cli.presets import Preset
from modiff_trt.tools.cli.quantized_folder import CARD, HALF, NETWORK, RECORD, REPORT, SCALES, SCHEMA, TRAJECTORIES, Inputs

if TYPE_CHECKING:
    from modiff_trt.core.scales import Scales
    from modiff_trt.networks.operations import Network


def quantize(
    *,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="folder for scales, ONNX file and report")],
    preset: Annotated[
        Preset,
        typer.Option(help="fast: no search; balanced: searches grids where they limit; exact: learned weights too"),
    ] = Preset.BALANCED,
    timesteps: Annotated[int, typer.Option(help="steps of the solver")] = 100,
    solver: SolverName = None,
    spacing: SpacingName = None,
    prediction: PredictionName = None,
    clip_sample: ClipSample = None,
    steps_offset: StepsOffset = None,
    final_alpha: FinalAlphaName = None,
    context: ContextFile = None,
    guidance: Guidance = None,
    weight_bit: Annotated[int, typer.Option(help="bits of the weights, 2 to 8")] = 8,
    act_bit: Annotated[int, typer.Option(help="bits of the activations, 2 to 8")] = 8,
    min_intensity: Annotated[
        float, typer.Option(help="leave layers in float that do fewer multiply-accumulates per element moved; 0: none")
    ] = INTENSITY,
    modes: Annotated[Modes, typer.Option(help="auto: state only where it pays, by trial and by what it costs")] = Modes.RECIPE,
    costs: Annotated[Path | None, typer.Option(help="--modes auto: file of `bench --costs`")] = None,
    num_samples: Annotated[int, typer.Option(help="calibration images")] = 16,
    batch_size: BatchSize = 8,
    engine: Annotated[
        str | None, typer.Option(help="build a TensorRT plan too: rtx:sm89, say, needs no GPU; rtx or tensorrt, for this one")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be read, written and how long, and end")] = False,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Quantize a checkpoint: trajectories, scales, ONNX file, report and README, each kept when the command is run again."""
    from modiff_trt.core.config import config_to_dict
    from modiff_trt.core.context import load_context
    from modiff_trt.core.costs import load_costs
    from modiff_trt.core.files import check_writable, locked, sha256
    from modiff_trt.core.scales import load_scales
    from modiff_trt.export.calibration.static import Recipe, check_recipe
    from modiff_trt.runtime.backends.registry.options import (
        check_device,
        checkpoint_manifest,
        default_solver,
        load_model,
    )
    from modiff_trt.runtime.backends.registry.steps import SolverOptions
    from modiff_trt.tools.cli.collect import collect
    from modiff_trt.tools.cli.dry_run import collect_seconds, takes, tell
    from modiff_trt.tools.cli.engine_stage import Engine
    from modiff_trt.tools.cli.export import export
    from modiff_trt.tools.cli.report import report

    check_device(device)
    if min(num_samples, batch_size) < 1:
        raise InputError("--num-samples and --batch-size must be at least 1")
    if costs is not None and modes != Modes.AUTO:
        raise InputError("--costs is for --modes auto")
    network, checkpoint = load_model(config, ckpt, weights, model=model)
    given_context = load_context(context, guidance, network.config.architecture)
    # What a later stage would refuse is refused before the first.
    options = SolverOptions(
        solver, spacing, prediction, clip_sample=clip_sample, steps_offset=steps_offset, final_alpha=final_alpha
    )
    steps = options.over(default_solver(config, model)).timesteps(network.config.diffusion, timesteps)
    recipe = Recipe(weight_bits=weight_bit, act_bits=act_bit, min_intensity=min_intensity)
    check_recipe(network, recipe, len(steps))
    if costs is not None:
        load_costs(costs, [spec.name for spec in network.layers], batch=None)
    made = Engine.of(engine, given_context.copies) if engine is not None else None
    if not dry_run:
        check_writable(out / RECORD)
    settings = {
        "config": config_to_dict(network.config),
        **checkpoint_manifest(checkpoint),
        # Of a diffusers folder: its scheduler.
        "default_solver": default_solver(config, model).to_dict(),
        "preset": preset,
        "timesteps": timesteps,
        "solver": solver,
        "spacing": spacing,
        "prediction": prediction,
        "clip_sample": clip_sample,
        "steps_offset": steps_offset,
        "final_alpha": final_alpha,
        "context_sha256": None if context is None else sha256(context),
        "guidance": guidance,
        "weight_bit": weight_bit,
        "act_bit": act_bit,
        "min_intensity": min_intensity,
        "modes": modes,
        "costs_sha256": None if costs is None else sha256(costs),
        "num_samples": num_samples,
    }
    of_model: dict[str, Any] = {"config": config, "ckpt": ckpt, "model": model, "weights": weights}
    given = "" if context is None else f" --context {context}" + ("" if guidance is None else f" --guidance {guidance:g}")
    place = "FILE.npz" if network.config.latent else "FOLDER"
    command = f"modiff-trt sample --backend onnx --onnx {out / NETWORK}{given} --num-samples 16 --out {place}"
    source = model.resolve() if model is not None else ckpt
    assert source is not None  # else `load_model` has refused
    called = source.name if model is not None else source.stem
    record: dict[str, Any] = {}
    trajectories, scales = out / TRAJECTORIES, out / SCALES
    stages: dict[str, tuple[str, Callable[[], str | None]]] = {
        "collect": (
            TRAJECTORIES,
            lambda: collect(
                **of_model,
                out=trajectories,
                timesteps=timesteps,
                solver=solver,
                spacing=spacing,
                prediction=prediction,
                clip_sample=clip_sample,
                steps_offset=steps_offset,
                final_alpha=final_alpha,
                context=context,
                guidance=guidance,
                num_samples=num_samples,
                batch_size=batch_size,
                device=device,
            ),
        ),
        "calibrate": (
            SCALES,
            lambda: calibrate(
                **of_model,
                trajectories=trajectories,
                out=scales,
                preset=preset,
                weight_bit=weight_bit,
                act_bit=act_bit,
                min_intensity=min_intensity,
                modes=modes,
                costs=costs,
                batch_size=batch_size,
                device=device,
            ),
        ),
        "export": (
            NETWORK,
            lambda: export(**of_model, out=out / NETWORK, scales=scales, dtype="fp16" if device == "cuda" else "fp32"),
        ),
        "report": (
            REPORT,
            lambda: report(**of_model, out=out / REPORT, scales=scales, context=context, guidance=guidance, device=device),
        ),
    }
    if made is not None:
        half = NETWORK if device == "cuda" else HALF
        if half != NETWORK:
            stages["export fp16"] = (HALF, lambda: export(**of_model, out=out / HALF, scales=scales, dtype="fp16"))
        plan = made.plan(out)
        stages["build"] = (plan.name, lambda: made.build(out / half, load_scales(scales)))
    stages |= {
        "README": (
            CARD,
            lambda: _write_card(
                called, out, network, record=record, weights=checkpoint.weights, copies=given_context.copies, sample=command
            ),
        ),
    }
    if dry_run:
        record |= _record(out / RECORD, settings)
        tell(
            [path for path in (config, ckpt, model, context, costs) if path is not None],
            {name: (out / file, _stands(record, name, out / file)) for name, (file, _) in stages.items()},
            collect_seconds(network, checkpoint, given_context, passes=len(steps) * num_samples, device=device),
            learns_weights=preset == Preset.EXACT,
        )
        return
    with locked(out):
        record |= _record(out / RECORD, settings)
        _keep_inputs(out / RECORD, record, Inputs(config, ckpt, model, weights=weights, context=context, guidance=guidance))
        if any(not _stands(record, name, out / file) for name, (file, _) in stages.items()):
            record["stages"].pop("README", None)  # it names what the others made
        for number, (name, (file, run)) in enumerate(stages.items(), 1):
            title = f"[{number}/{len(stages)}] {name}"
            if name == "report" and (why := _no_report(network, load_scales(scales))):
                typer.echo(f"{title}: none, since {why}")
                continue
            took = record["stages"].get("collect", {}).get("seconds", 0.0)
            if not _stands(record, name, out / file):
                title += takes(name, took, learns_weights=preset == Preset.EXACT)
            _stage(out / RECORD, record, name, out / file, run, title=title)
    typer.echo(f"{out}: sample with `{command}`")


def _no_report(network: Network, scales: Scales) -> str | None:
    """Why there is nothing to report, if there is not."""
    from modiff_trt.runtime.images.folders import makes_pictures

    if not scales.modulated:
        return "no layer has kept its state"
    if not makes_pictures(network.config):
        return "it shows pictures, and this network makes latents"
    return None


def _with_plan(out: Path, stages: dict[str, Any], sample: str) -> list[str]:
    """How to sample from the plan, where one was built."""
    if "build" not in stages:
        return []
    half = stages.get("export fp16", stages["export"])["file"]
    on_plan = sample.replace(f"--backend onnx --onnx {out / NETWORK}", f"--backend trt --plan {out / stages['build']['file']}")
    return [on_plan, f"modiff-trt verify --onnx {out / half} --plan {out / stages['build']['file']}   # is the engine right?"]


def _write_card(
    name: str, out: Path, network: Network, *, record: dict[str, Any], weights: str, copies: int, sample: str
) -> None:
    """The folder's README."""
    from modiff_trt.core.context import from_noise_to_pictures
    from modiff_trt.core.files import atomic_path
    from modiff_trt.core.scales import load_scales
    from modiff_trt.tools.provenance import provenance
    from modiff_trt.tools.report.model_card import model_card

    alone = from_noise_to_pictures(network.config)
    made = provenance()
    text = model_card(
        name,
        network,
        load_scales(out / SCALES),
        record["stages"],
        checkpoint=weights,
        made=f"`{made['command']}` on {datetime.now(UTC).date().isoformat()}, torch {made['versions']['torch']}",
        commands=[
            sample,
            *_with_plan(out, record["stages"], sample),
            f"modiff-trt package --onnx {out / NETWORK} --out FOLDER   # samples without torch",
        ],
        copies=copies,
        has_pipeline=alone,
    )
    with atomic_path(out / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _record(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is done already, of the same settings. Raises InputError where the folder is of others."""
    from modiff_trt.core.files import read_signed, signed

    wanted = signed({"settings": settings})["settings"]
    if not path.exists():
        return {"schema": SCHEMA, "settings": wanted, "stages": {}}
    record = read_signed(path, "record of a quantization", "choose another --out")
    if (
        record.get("schema") != SCHEMA
        or not isinstance(record.get("settings"), dict)
        or not isinstance(record.get("stages"), dict)
    ):
        raise InputError(f"{path} is no record of a quantization of this version; choose another --out")
    differing = [name for name, value in wanted.items() if record["settings"].get(name) != value]
    if differing:
        raise InputError(f"{path.parent} holds a quantization with another {', '.join(differing)}; choose another --out")
    return record


def _keep_inputs(at: Path, record: dict[str, Any], inputs: Inputs) -> None:
    """Where the checkpoint lies, for `report --model`: it may have moved since an earlier call."""
    from modiff_trt.core.files import write_signed

    if record.get("inputs") != (kept := inputs.to_dict()):
        record["inputs"] = kept
        if record["stages"]:
            write_signed(at, record)


def _stands(record: dict[str, Any], name: str, file: Path) -> bool:
    """Whether a stage is done and its file as it was written."""
    from modiff_trt.core.files import sha256

    done = record["stages"].get(name)
    return done is not None and done["file"] == file.name and file.exists() and sha256(file) == done["sha256"]


def _stage(at: Path, record: dict[str, Any], name: str, file: Path, run: Callable[[], str | None], title: str) -> None:
    """Runs a stage unless its file is there as it was written, and writes down that it is done."""
    from modiff_trt.core.files import sha256, write_signed

    if _stands(record, name, file):
        typer.echo(f"{title}: {file} is there already")
        return
    typer.echo(title)
    begin = time.perf_counter()
    said = run()
    # What was made from an earlier version of this file is not of it.
    later = list(record["stages"])
    for stage in later[later.index(name) :] if name in later else []:
        del record["stages"][stage]
    record["stages"][name] = {"file": file.name, "sha256": sha256(file), "seconds": round(time.perf_counter() - begin, 1)}
    if said is not None:
        record["stages"][name]["said"] = said
    write_signed(at, record)
