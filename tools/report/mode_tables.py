"""The tables of what a layer's mode costs, and of the curves that calibration found with it."""

from __future__ import annotations

from typing import Any

from modiff_trt.tools.report.keyed_tables import table


def mode_costs(data: dict[str, Any]) -> str:
    """Microseconds an image of each kind of layer in another mode, measured and modelled."""
    lines = {}
    for entry in data["costs"]:
        cells = [str(entry["count"]), entry["mode"]]
        for mode in ("int8", "float"):
            cells.append("" if mode not in entry else f"{entry[mode]:+.3f}")
            cells.append("" if mode not in entry else f"{entry[f'{mode} modelled']:+.3f}")
        lines[f"{entry['layers']} ({entry['first']})"] = cells
    headings = ["layers", "mode", "as INT8", "modelled", "as float", "modelled"]
    note = (
        f"\nMicroseconds an image and pass that one such layer adds in the other mode, batch 256, {data['machine']['gpu']}; "
        f"the whole pass takes {data['whole_us']:.2f} (`results/modes_h200.json`)."
    )
    return "\n".join([*table("kind of layer (the first)", headings, lines), note])


def mode_mixtures(data: dict[str, Any]) -> str:
    """Passes of random mixtures of modes, as the costs predict them and as they came."""
    lines = {
        ", ".join(f"{mixture[mode]} {mode}" for mode in ("modiff", "int8", "float")): [
            f"{mixture['predicted']:.2f}",
            f"{mixture['measured']:.2f}",
            f"{100 * mixture['error']:+.1f} %",
        ]
        for mixture in data["mixtures"]
    }
    return "\n".join(table("layers", ["predicted, us", "came, us", "error"], lines))


def mode_times(data: dict[str, Any]) -> str:
    """Chosen modes beside full modulation, none, and floating point, in one call."""
    lines = {}
    for batch, rows in data["timed"].items():
        exact = rows["torch-fp16-compiled"]["microseconds_an_image"]
        for name, row in rows.items():
            time = row["microseconds_an_image"]
            lines[f"{name}, {batch}"] = [f"{time:.1f}", f"{exact / time:.2f}x", f"{row['state_bytes_an_image'] / 1e6:.1f}"]
    return "\n".join(table("backend, batch", ["us an image", "to FP16 compiled", "state, MB an image"], lines))


def cpu_modes(data: dict[str, Any]) -> str:
    """Chosen modes beside full modulation, none, and FP32, on a CPU."""
    lines = {}
    for batch, rows in data["cpu"]["timed"].items():
        exact = rows["torch-fp32"]["microseconds_an_image"]
        for name, row in rows.items():
            time = row["microseconds_an_image"]
            lines[f"{name}, {batch}"] = [f"{time / 1e3:.1f}", f"{exact / time:.2f}x"]
    cores = data["cpu"]["machine"]["cores"]
    return "\n".join(
        [*table("backend, batch", ["ms an image", "to FP32"], lines), "", f"{cores} cores, {data['cpu']['machine']['model']}."]
    )


def adaround_seeds(data: dict[str, Any]) -> str:
    """PSNR of weights alone by the seed of trajectories and training."""
    seeds = data["adaround"]["seeds"]
    lines = {}
    for key, title in (
        ("nearest", "nearest"),
        ("nearest_corrected", "nearest, biases corrected"),
        ("adaround", "AdaRound"),
        ("adaround_corrected", "AdaRound, biases corrected"),
    ):
        values = [seed[key] for seed in seeds.values()]
        cells = [f"{value:.1f}" for value in values]
        lines[title] = [*cells, f"{sum(values) / len(values):.1f}", f"{max(values) - min(values):.1f}"]
    return "\n".join(table("weights alone, dB", [*(f"seed {seed}" for seed in seeds), "mean", "spread"], lines))


def mode_curves(data: dict[str, Any]) -> str:
    """PSNR by the number of layers that keep state."""
    parts = []
    for name, points in data["curves"].items():
        cells = [[str(p["layers_with_state"]) for p in points], [f"{p['psnr_db']:.1f}" for p in points]]
        parts += [f"{name}:", "", *table("layers with state", cells[0], {"PSNR, dB": cells[1]}), ""]
    return "\n".join(parts[:-1])


def zero_points(data: dict[str, Any]) -> str:
    """PSNR of layers without state by the zero point of their grids."""
    bits = ("A8", "A6", "A4")
    lines = {}
    for name, found in data["stateless"].items():
        lines[name] = [f"{found[b]:.1f}" if b in found else "" for b in bits]
    return "\n".join(table("PSNR, dB", list(bits), lines))


def grid_searches(data: dict[str, Any]) -> str:
    """PSNR of layers without state by how their grids are found, for two sets of images."""
    lines = {name: [f"{value:.1f}" for found in sets for value in found] for name, sets in data["grids"].items()}
    return "\n".join(table("PSNR, dB", ["12 together", "mean of each", "12 others together", "mean of each"], lines))


def moving_grids(data: dict[str, Any]) -> str:
    """PSNR of layers without state by how their grids move, at few steps and at many."""
    lines = {name: [f"{v:.1f}" for v in few] or ["", ""] for name, (few, _) in data["shifts"].items()}
    for name, (_, many) in data["shifts"].items():
        lines[name] += [f"{v:.1f}" for v in many] or ["", ""]
    headings = ["20 steps, together", "mean of each", "100 steps, together", "mean of each"]
    return "\n".join(table("shifts, dB", headings, lines))


def mixtures_timed(data: dict[str, Any]) -> str:
    """Microseconds of mixtures as they came, as single costs add up, and with what layers save together."""
    return _predictions("mixture", data["mixtures_timed"], {"one by one": "predicted one by one", "together": "and together"})


def _predictions(first: str, mixtures: dict[str, Any], ways: dict[str, str]) -> str:
    """Microseconds of each mixture as they came, and as each of the `ways`, by heading, predicted them."""
    lines = {}
    for name, found in mixtures.items():
        came = found["measured"]
        lines[name] = [f"{came:.2f}", *(f"{found[how]:.2f} ({100 * (found[how] / came - 1):+.1f} %)" for how in ways)]
    return "\n".join(table(first, ["came, us", *ways.values()], lines))


def mode_choices(data: dict[str, Any]) -> str:
    """What mixtures of modes lose of full modulation on the images that they were chosen on, and on others."""
    images = list(dict.fromkeys(name for found in data["other_images"].values() for name in found))
    lines = {}
    for name, found in data["other_images"].items():
        lines[name] = [f"{found[i][0] - found[i][1]:.1f}" if i in found else "" for i in images]
    return "\n".join(table("loss, dB", images, lines))


def biases(data: dict[str, Any]) -> str:
    """PSNR of rounded weights alone, before and after bias correction."""
    lines = {}
    for row in data["rows"]:
        cells = [row["before"], row["equal"], row["final image"]]
        lines[f"{row['network']}, {row['images']} images"] = ["" if cell is None else f"{cell:.1f}" for cell in cells]
    headings = ["without", "corrected, steps alike", "corrected, steps by the final image"]
    return "\n".join(table("weights alone, dB to FP32", headings, lines))


def edges(data: dict[str, Any]) -> str:
    """Convolutions in float with few input or few output channels, by the general kernel and by their own."""
    lines = {
        name: [f"{found['before']:.1f}", f"{found['now']:.1f}", f"{found['error before']:.0e}", f"{found['error']:.0e}"]
        for name, found in data["edges"].items()
    }
    return "\n".join(table("layer, 3x3", ["us before", "us now", "error before", "error now"], lines))


def mixtures_estimated(data: dict[str, Any]) -> str:
    """Microseconds of mixtures as they came, as costs said before, and as they are estimated from all passes."""
    ways = {"before": "predicted before", "estimated": "estimated from all passes"}
    return _predictions("layers with state", data["mixtures"], ways)


def layers_alone(data: dict[str, Any]) -> str:
    """How far one layer without state moves the final image, by what the others do."""
    lines = {
        name: ["" if found[how] is None else f"{found[how]:.1e}" for how in ("exact", "rounding")]
        for name, found in data["alone"]["cpu, 2 images"].items()
    }
    return "\n".join(table("layer without state", ["others exact", "others with state"], lines))


def mode_images(data: dict[str, Any]) -> str:
    """PSNR to FP32 of many images that no mode was chosen on."""
    lines = {
        name: [f"{found[part]:.1f}" for part in ("together", "mean", "median", "least")]
        for name, found in data["psnr_512"].items()
    }
    return "\n".join(table("layers with state", ["together, dB", "mean", "median", "worst"], lines))


def adaround_corrections(data: dict[str, Any]) -> str:
    """PSNR of weights alone by seed, as biases are corrected."""
    seeds = data["adaround"]
    lines = {}
    for key, title in (
        ("nearest, local", "nearest, each layer's own shift (what `calibrate` does)"),
        ("nearest, empirical", "nearest, shift against the network so far"),
        ("adaround", "AdaRound"),
        ("adaround, local", "AdaRound, each layer's own shift (what `calibrate` does)"),
        ("adaround, empirical", "AdaRound, shift against the network so far"),
        ("adaround, empirical with gains", "AdaRound, shift and gain"),
        ("adaround, empirical unweighted", "AdaRound, all steps alike"),
    ):
        if key not in seeds["0"]:
            continue
        values = [seed[key]["mean"] for seed in seeds.values()]
        lines[title] = [*(f"{v:.1f}" for v in values), f"{sum(values) / len(values):.1f}", f"{max(values) - min(values):.1f}"]
    return "\n".join(table("weights alone, mean of 48 images, dB", [*(f"seed {s}" for s in seeds), "mean", "spread"], lines))
