"""Renders the tables of README.md from the files under results/: `python -m modiff_trt.tools.report.results_tables README.md`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`, which says the file in
results/ and the function that renders it. With --check nothing is written, and the exit code says whether the tables are
current.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path, read_result
from modiff_trt.tools.report.command_tables import demo, quantize
from modiff_trt.tools.report.keyed_tables import by_bits
from modiff_trt.tools.report.mode_tables import (
    adaround_corrections,
    adaround_seeds,
    biases,
    cpu_modes,
    edges,
    grid_searches,
    layers_alone,
    mixtures_estimated,
    mixtures_timed,
    mode_choices,
    mode_costs,
    mode_curves,
    mode_images,
    mode_mixtures,
    mode_times,
    moving_grids,
    zero_points,
)
from modiff_trt.tools.report.network_tables import (
    chosen_modes,
    classes,
    estimates,
    full_width,
    gpu_speed,
    installs,
    layouts,
    networks_speed,
    plans,
    predictions,
)
from modiff_trt.tools.report.robustness_tables import fuzz, kills, load, memory
from modiff_trt.tools.report.solver_tables import grids, nearness, quality

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _source(data: dict[str, Any], what: str) -> str:
    rounding = data.get("weights rounded by", "nearest rounding")
    return (
        f"\n{what}; PSNR in dB of {data['images']} images to FP32 from the same noise, {data['timesteps']} quad steps, W8 by "
        f"{rounding}, simulated on one {data['machine']['gpu']} with torch {data['versions']['torch']}. Empty: not run."
    )


def methods(data: dict[str, Any]) -> str:
    """The six rows of the paper's table by activation bits."""
    return "\n".join([*by_bits(data["methods"], "method"), _source(data, "Warm-up of two rows, no dither")])


def starts(data: dict[str, Any]) -> str:
    """How a trajectory begins, by activation bits."""
    return "\n".join([*by_bits(data["starts"], "start"), _source(data, "MoDiff with static scales")])


def rows(data: dict[str, Any]) -> str:
    """Static grids against a grid per row, with and without dither."""
    return "\n".join([*by_bits(data["rows"], "MoDiff grids"), _source(data, "Warm-up down to the running grid")])


def trials(data: dict[str, Any]) -> str:
    """What a search for the static residual scale saw: PSNR by the share of the residuals that the grid holds."""
    note = (
        f"\nThe search of `calibrate --search scales` for the table above: PSNR in dB of {data['trial images']} trial images "
        f"(other noise), {data['timesteps']} quad steps."
    )
    return "\n".join([*by_bits(data["trials"], "residual scale"), note])


def _backends(data: dict[str, Any]) -> list[str]:
    """The backends of a benchmark that ran at any batch size, the one that the others are compared with first."""
    return list(dict.fromkeys(name for rows in data["batches"].values() for name in rows))


def _ratio(rows: dict[str, Any], name: str) -> float:
    """How many times as fast as the first backend one was, at one batch size."""
    return float(next(iter(rows.values()))["microseconds"] / rows[name]["microseconds"])


def bench(data: dict[str, Any]) -> str:
    """One line for each backend, one column for each batch size: microseconds an image and pass, and the ratio to the first."""
    batches = sorted(data["batches"], key=int)
    names = _backends(data)
    lines = ["| us an image and pass (ratio) | " + " | ".join(f"batch {b}" for b in batches) + " | state, MB an image |"]
    lines.append("|---|" + "---|" * (len(batches) + 1))
    for name in names:
        cells = []
        for b in batches:
            rows = data["batches"][b]
            if name not in rows:
                cells.append("")
                continue
            cells.append(f"{rows[name]['microseconds_an_image']:,.1f} ({_ratio(rows, name):.2f}x)")
            state = rows[name]["state_bytes_an_image"] / 1e6
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {state:.1f} |")
    machine = data["machine"].get("gpu") or f"{data['machine']['cores']} cores ({data['machine']['processor']})"
    costs = [
        f"{rows['native-modiff']['microseconds'] / rows['native-int8']['microseconds']:.2f}x at batch {b}"
        for b, rows in ((b, data["batches"][b]) for b in batches)
        if {"native-modiff", "native-int8"} <= set(rows)
    ]
    if costs:
        lines.append(f"\nMoDiff takes of the same backend without state: {', '.join(costs)}.")
    rows = data["batches"][batches[-1]]
    peaks = [f"{rows[name]['memory_bytes'] / 1e9:.2f} GB by {name}" for name in names if rows.get(name, {}).get("memory_bytes")]
    if peaks:
        lines.append(f"\nPeak GPU memory at batch {batches[-1]}: {', '.join(peaks)}.")
    how = f"Median of {data['runs']} interleaved runs of {data['passes']} passes"
    lines.append(f"\n{how}, {machine}, torch {data['versions']['torch']}.")
    return "\n".join(lines)


def profile(data: dict[str, Any]) -> str:
    """Time of the native backend's pass by class of kernel, one column for each batch size, beside the floor."""
    parts = {batch: data["profiles"][batch]["classes"] for batch in sorted(data["profiles"], key=int)}
    largest = list(parts)[-1]
    lines = ["| us an image and pass (share) | " + " | ".join(f"batch {b}" for b in parts) + " | floor | launches |"]
    lines.append("|---|" + "---|" * (len(parts) + 2))
    totals = {b: sum(row["microseconds_an_image"] for row in classes.values()) for b, classes in parts.items()}
    for name, row in parts[largest].items():
        times = {b: classes[name]["microseconds_an_image"] for b, classes in parts.items()}
        floor = row["floor_microseconds_an_image"]
        least = f"{floor:.1f} ({times[largest] / floor:.1f}x at {largest})" if floor else ""
        cells = [f"{t:.1f} ({t / totals[b]:.0%})" for b, t in times.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {least} | {next(iter(parts.values()))[name]['launches']:.0f} |")
    rows = {b: data["batches"][b]["native-modiff"] for b in parts}
    lines.append("| all kernels | " + " | ".join(f"{t:.1f}" for t in totals.values()) + " | | |")
    lines.append("| the pass | " + " | ".join(f"{row['microseconds_an_image']:.1f}" for row in rows.values()))
    lines[-1] += f" | {rows[largest]['floor_microseconds_an_image']:.1f} | |"
    reached = data["ceilings"]
    lines.append(
        f"\nMoDiff W8A8, {data['machine']['gpu']}. Ceilings: {reached['copy_bytes_a_second'] / 1e12:.2f} TB/s, "
        f"{reached['int8_operations_a_second'] / 1e12:.0f} TOPS INT8, {reached['fp16_operations_a_second'] / 1e12:.0f} TFLOP/s "
        "FP16, measured in the same process."
    )
    return "\n".join(lines)


def weights(data: dict[str, Any]) -> str:
    """Rounding of weights alone."""
    part = data["weights"]
    lines = ["| weights | nearest, min-max scale | nearest, MSE scale | AdaRound | seconds |", "|---|---|---|---|---|"]
    for b in (8, 4):
        cells = [f"{part[f'W{b} {name}']:.1f}" for name in ("nearest, minmax", "nearest, mse", "AdaRound", "AdaRound seconds")]
        lines.append(f"| W{b} | " + " | ".join(cells) + " |")
    lines.append(f"\nActivations in float; PSNR in dB of {data['images']} images to FP32, {data['timesteps']} quad steps;")
    return "\n".join([*lines, f"AdaRound on {data['calibration_images']} trajectories on one {data['machine']['gpu']}."])


NO_HELP = {
    "float residuals mse": "MSE-optimal scale",
    "quantized residuals minmax": "min-max of the residuals against the quantized network's own `a_hat`",
    "quantized residuals mse": "their MSE-optimal scale",
    "quantized residuals percentile": "their percentile",
    "quantized residuals learned": "the released code's learned scale",
}


def no_help(data: dict[str, Any]) -> str:
    """Residual scales that were tried and are not the default."""
    lines = ["| residual scale | A4 | A3 |", "|---|---|---|"]
    for key, name in NO_HELP.items():
        cells = [data["figures"].get(f"{key} A{bits}") for bits in (4, 3)]
        lines.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells) + " |")
    lines.append(f"\nPSNR in dB of {data['images']} images to FP32, {data['timesteps']} {data['skip_type']} steps.")
    return "\n".join(lines)


def states(data: dict[str, Any]) -> str:
    """Types of the state between passes."""
    lines = ["| a_hat, o_hat | to FP32, dB | to state in float64, dB |", "|---|---|---|"]
    for name, figures in data["states"].items():
        lines.append(f"| {name.rsplit(' A', 1)[0]} | {figures['to FP32']:.1f} | {figures['to float64']:.1f} |")
    where = data["machine"].get("gpu") or f"{data['machine']['cores']} CPU cores"
    lines.append(
        f"\nThe demo model, W8A8 to nearest, {data['images']} images, {data['timesteps']} {data['skip_type']} steps, {where}."
    )
    return "\n".join(lines)


def native_images(data: dict[str, Any]) -> str:
    """Images of the native backend against those of the simulation."""
    lines = ["| | native, dB | simulation, dB | native to simulation, dB | state, MB an image |", "|---|---|---|---|---|"]
    for name, row in data["rows"].items():
        cells = [f"{row[key]:.2f}" for key in ("native_db", "torch_sim_db", "native_to_sim_db")]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['state_mb']:.1f} |")
    what = data["what"][0].upper() + data["what"][1:]
    lines.append(f"\n{what}; one {data['machine']['gpu']}, torch {data['versions']['torch']}.")
    many = data["many"]
    difference, low, high = many["native minus simulation"]
    never, *_ = many["native, never refreshed minus simulation"]
    lines.append(
        f"\nOf {many['images']} images, A8, lean: native is {-difference:.2f} dB (95 %: {-high:.2f} to {-low:.2f}) below the "
        f"simulation's {many['torch_sim_db']:.2f}; without recomputing `o_hat`, {-never:.2f}."
    )
    return "\n".join(lines)


def evaluation(data: dict[str, Any]) -> str:
    """Sets of images; the paper's figures stand beside those of the paper's checkpoint alone."""
    from modiff_trt.tools.cli.evaluate import HEADINGS, rows_of

    headings = [h for h in HEADINGS if h != "checkpoint"] + ["FD-CIFAR to FP16's"]
    rows = []
    for row, entry in zip(rows_of(data), data["sets"].values(), strict=True):
        near = entry.get("fd-cifar", {}).get("to full precision", {}).get("FD-CIFAR")
        rows.append([*row[:-1], f"{near:.4f}" if near is not None else ""])
    filled = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    lines = ["| " + " | ".join(headings[i] for i in filled) + " |", "|---" * len(filled) + "|"]
    lines += ["| " + " | ".join(row[i] for i in filled) + " |" for row in rows]
    first = next(iter(data["sets"].values()))
    what = data["what"][0].upper() + data["what"][1:]
    lines.append(f"\n{what}; {first['machine']['gpu']}. Distances of fewer images are larger by themselves. Empty: not run.")
    return "\n".join(lines)


def classifier(data: dict[str, Any]) -> str:
    """The network behind FD-CIFAR."""
    head = "| FD-CIFAR's classifier | MB | test images named rightly, % |\n|---|---|---|\n"
    row = f"| `{data['file']}` | {data['bytes'] / 1e6:.1f} | {100 * data['test_accuracy']:.1f} |\n"
    return f"{head}{row}\nTrained on {data['what'].split('trained on ')[1]}; {data['machine']['gpu']}."


def scaling(data: dict[str, Any]) -> str:
    """Images a second on one GPU and on two."""
    lines = ["| GPUs | images a second | ratio |", "|---|---|---|"]
    one = data["one"]["images_a_second"]
    for name, part in (("1", data["one"]), ("2", data["two"])):
        lines.append(f"| {name} | {part['images_a_second']:.0f} | {part['images_a_second'] / one:.2f}x |")
    same = "the same, bit for bit" if data["identical"] else "**not all the same**"
    lines.append(f"\n{data['what'][0].upper() + data['what'][1:]}; {data['machine']['gpu']}. The images of both are {same}.")
    return "\n".join(lines)


# Table name -> (file in results/, how it is rendered)
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo", demo),
    "methods": ("methods100_adaround", methods),
    "methods_50": ("methods50_adaround", methods),
    "weights": ("study50", weights),
    "starts": ("study50", starts),
    "starts_adaround": ("study50_adaround", starts),
    "starts_percentile": ("starts50_percentile", starts),
    "rows_adaround": ("rows50_adaround", rows),
    "rows_adaround_100": ("rows100_adaround", rows),
    "trials_50": ("rows50_adaround", trials),
    "bench_h200": ("bench_h200", bench),
    "no_help": ("residual_scales50", no_help),
    "states_100": ("states100_demo", states),
    "states_1000": ("states1000_demo", states),
    "profile": ("bench_h200", profile),
    "classifier": ("fd_cifar", classifier),
    "scaling": ("scaling_h200", scaling),
    "kills": ("kill_trials", kills),
    "memory": ("memory_trials", memory),
    "evaluation": ("evaluation_h200", evaluation),
    "native_images": ("native_images_h200", native_images),
    "bench_cpu_cifar10": ("bench_cpu_cifar10", bench),
    "bench_cpu_demo": ("bench_cpu_demo", bench),
    "quantize": ("quantize_cpu", quantize),
    "biases": ("bias_correction_cpu", biases),
    "layouts": ("layouts", layouts),
    "classes": ("classes", classes),
    "full_width": ("sd15_cpu", full_width),
    "plans": ("plans_sd15", plans),
    "plans_ldm8": ("plans_ldm8", plans),
    "plans_classes": ("plans_classes", plans),
    "installs": ("installs", installs),
    "gpu_speed": ("sd15_speed_h200", gpu_speed),
    "networks_speed": ("networks_speed_h200", networks_speed),
    "chosen_modes": ("modes_sd15_h200", chosen_modes),
    "mode_estimates": ("modes_sd15_h200", estimates),
    "mode_predictions": ("modes_sd15_h200", predictions),
    "stateless_modes": ("modes_sd15_stateless_h200", chosen_modes),
    "stateless_predictions": ("modes_sd15_stateless_h200", predictions),
    "stateless_curve": ("modes_sd15_stateless_h200", mode_curves),
    "mode_costs": ("modes_h200", mode_costs),
    "mode_curves": ("modes_h200", mode_curves),
    "mode_mixtures": ("modes_h200", mode_mixtures),
    "mode_times": ("modes_h200", mode_times),
    "zero_points": ("zero_point_h200", zero_points),
    "zero_point_curves": ("zero_point_h200", mode_curves),
    "zero_point_times": ("zero_point_h200", mode_times),
    "grid_searches": ("zero_point_h200", grid_searches),
    "moving_grids": ("moving_grids_h200", moving_grids),
    "mixtures_timed": ("moving_grids_h200", mixtures_timed),
    "moving_times": ("moving_grids_h200", mode_times),
    "moving_on_cpu": ("moving_grids_h200", cpu_modes),
    "moving_choices": ("moving_grids_h200", mode_choices),
    "moving_curves": ("moving_grids_h200", mode_curves),
    "edges": ("edges_h200", edges),
    "edge_times": ("edges_h200", mode_times),
    "edge_mixtures": ("edges_h200", mixtures_estimated),
    "edge_images": ("edges_h200", mode_images),
    "edge_curves": ("edges_h200", mode_curves),
    "adaround_corrections": ("edges_h200", adaround_corrections),
    "adaround_64": ("adaround_64_h200", adaround_corrections),
    "layers_alone": ("modes_alone_h200", layers_alone),
    "alone_curves": ("modes_alone_h200", mode_curves),
    "alone_costs": ("modes_alone_h200", mode_mixtures),
    "choice_on_cpu": ("costs_cpu", cpu_modes),
    "costs_on_cpu": ("costs_cpu", mode_mixtures),
    "choice_on_amx": ("costs_cpu_amx", cpu_modes),
    "costs_on_amx": ("costs_cpu_amx", mode_mixtures),
    "choice_by_spread": ("costs_cpu_stateless", cpu_modes),
    "costs_by_spread": ("costs_cpu_stateless", mode_mixtures),
    "alone_times": ("modes_alone_h200", mode_times),
    "alone_images": ("modes_alone_h200", mode_images),
    "confirmed_curves": ("modes_confirmed_h200", mode_curves),
    "confirmed_costs": ("modes_confirmed_h200", mode_mixtures),
    "confirmed_times": ("modes_confirmed_h200", mode_times),
    "confirmed_images": ("modes_confirmed_h200", mode_images),
    "mode_choices": ("zero_point_h200", mode_choices),
    "adaround_seeds": ("modes_h200", adaround_seeds),
    "nearness": ("solver_study_h200", nearness),
    "quality": ("solver_study_h200", quality),
    "grids": ("solver_grids_h200", grids),
    "fuzz": ("fuzz_trials", fuzz),
    "load": ("load_trials", load),
}


def render(text: str, results: Path) -> str:
    """The text with every table block rendered anew. Raises InputError for an unknown table or a missing file."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise InputError(f"unknown table '{name}'; known: {', '.join(TABLES)}")
        file, table = TABLES[name]
        return f"{match[1]}{table(read_result(results / f'{file}.json', 'result'))}\n{match[3]}"

    return BLOCK.sub(replace, text)


def _results(document: Path) -> Path:
    """The folder results/ of the document's checkout."""
    folders = [folder / "results" for folder in document.resolve().parents]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def main(
    document: Annotated[Path, typer.Argument(help="the document whose tables are rendered")] = Path("README.md"),
    check: Annotated[bool, typer.Option(help="write nothing; fail if a table is not current")] = False,
) -> None:
    """Renders a document's tables from the JSON files in results/, beside it or in a folder above."""
    try:
        text = document.read_text(encoding="utf-8")
        rendered = render(text, _results(document))
        if check and rendered != text:
            raise InputError(f"the tables of {document} are not those of results/; run `make results-tables`")
        if not check:
            with atomic_path(document) as temporary:
                temporary.write_text(rendered, encoding="utf-8")
    except (InputError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
