"""The tables of networks: how near their answers are to diffusers', and what the method takes at their size."""

from __future__ import annotations

from typing import Any

from modiff_trt.tools.report.keyed_tables import table


def layouts(data: dict[str, Any]) -> str:
    """The largest difference to diffusers of each network."""
    lines = {
        name: [
            f"{row['parameters'] / 1e6:.0f}",
            str(row["layers"]),
            "x".join(map(str, row["input"])),
            f"{row['largest_difference']:.1e}",
        ]
        for name, row in data["networks"].items()
    }
    return "\n".join(table("network", ["parameters, M", "layers", "input", "largest difference"], lines))


def classes(data: dict[str, Any]) -> str:
    """PSNR to FP32 of the demo with classes, as `evaluate --same-noise` wrote it, by method and backend."""
    lines = {name: [f"{row['psnr_db']:.1f}", str(row["images"])] for name, row in data["sets"].items()}
    return "\n".join(table("method and backend", ["PSNR to FP32, dB", "images"], lines))


def gpu_speed(data: dict[str, Any]) -> str:
    """Milliseconds of a pass at Stable Diffusion's size, beside diffusers' own."""
    lines = {}
    for batch, row in data["batches"].items():
        ratio = row["diffusers_fp16_compiled_ms"] / row["native_int8_ms"]
        times = [f"{row[name]:.2f}" for name in ("diffusers_fp16_compiled_ms", "native_int8_ms")]
        lines[batch] = [*times, f"{ratio:.2f}x", f"{row['memory_gb']:.1f}"]
    second = data["second_machine"]
    ratios = " and ".join(
        f"{second['diffusers_fp16_compiled_ms'][n] / second['native_int8_ms'][n]:.2f}x at {n}" for n in second["native_int8_ms"]
    )
    note = (
        f"\n{data['machine']['gpu']}; {data['what']}. On another H200, in one call and before sums were split: {ratios} "
        "(`results/sd15_speed_h200.json`)."
    )
    columns = ["diffusers FP16, compiled, ms", "native INT8, ms", "ratio", "memory, GB"]
    return "\n".join([*table("batch", columns, lines), note])


def networks_speed(data: dict[str, Any]) -> str:
    """Milliseconds of a pass of networks that people have, by mode, beside diffusers' own where it was timed at that batch."""
    lines = {}
    for name, network in data["networks"].items():
        baseline = network["baseline"]["milliseconds"]
        for layers, parts in network["runs"].items():
            for run in parts:
                for images, rows in run["batches"].items():
                    batch = network["copies"] * int(images)
                    for backend, row in rows.items():
                        times = ["", "", ""]
                        if str(batch) in baseline:
                            ours, theirs = row["microseconds"] / 1e3, baseline[str(batch)]
                            times = [f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}x"]
                        state = row["state_bytes_an_image"] * int(images) / 1e9
                        cells = [*times, f"{row['memory_bytes'] / 1e9:.1f}", f"{state:.1f}"]
                        lines[f"{name}; {layers}: `{backend}`, {batch}"] = cells
    note = f"\n{data['machine']['gpu']}; {data['what']} (`results/networks_speed_h200.json`)."
    columns = ["diffusers FP16, compiled, ms", "native, ms", "ratio", "memory, GB", "of it state, GB"]
    return "\n".join([*table("network; quantized layers: backend, batch", columns, lines), note])


def chosen_modes(data: dict[str, Any]) -> str:
    """Milliseconds of a pass with modes that were chosen by costs, beside all layers alike and diffusers' own network."""
    lines = {}
    for row in data["table"]:
        times = [f"{row['fp16_ms']:.2f}", f"{row['ms']:.2f}", f"{row['ratio']:.2f}x"]
        sizes = [f"{row['memory_bytes'] / 1e9:.1f}", f"{row['state_bytes'] / 1e9:.2f}"]
        lines[f"{row['modes']}, {row['batch']}"] = times + sizes
    columns = ["diffusers FP16, compiled, ms", "native, ms", "ratio", "memory, GB", "of it state, GB"]
    return "\n".join(table("modes, batch", columns, lines))


def predictions(data: dict[str, Any]) -> str:
    """What costs of modes said of mixtures, and what came."""
    lines = {}
    for name, row in data["predictions"].items():
        predicted, came = row["predicted_us"] / 1e3, row["measured_us"] / 1e3
        lines[name] = [f"{predicted:.2f}", f"{came:.2f}", f"{100 * (predicted / came - 1):+.1f} %"]
    return "\n".join(table("modes", ["predicted, ms an image", "came, ms", "error"], lines))


def estimates(data: dict[str, Any]) -> str:
    """What two estimators made of the same times, beside what came."""
    found = data["estimates"]
    lines = {name: [f"{row[key]:.1f}" for key in ("came", "before", "now")] for name, row in found["rows"].items()}
    lines |= {f"rms, {name}": ["", *(f"{row[key]:.1f}" for key in ("before", "now"))] for name, row in found["rms"].items()}
    return "\n".join(table("% of the pass with all state", ["came", "predicted before", "predicted now"], lines))


def plans(data: dict[str, Any]) -> str:
    """What a builder made of a network, before a change of the exported graph and after it."""
    lines = {}
    for name, after in data["after"].items():
        before = data["before"].get(name, {})
        pairs = [
            f"{before[key]} to {after[key]}" if key in before else str(after[key]) for key in ("layers", "fused_attentions")
        ]
        in_int8 = after["quantized_layers_in_int8"] + after["plugin_layers"]
        cells = [*pairs, f"{in_int8} of {after['quantized_layers']}", f"{after['plan_bytes'] / 1e6:.0f}", f"{after['seconds']}"]
        lines[name.replace("-", ", ")] = cells
    columns = ["layers", "attentions in one kernel", "quantized layers in INT8", "MB", "seconds to build"]
    note = f"\n{data['what'][0].upper()}{data['what'][1:]} ({data['version']})."
    return "\n".join([*table("plan", columns, lines), note])


def installs(data: dict[str, Any]) -> str:
    """What new environments take."""
    lines = {
        f"`{name}`" if name.startswith("pip") else name: [
            f"{row['bytes'] / 1e6:.0f}",
            str(row["packages"]),
            f"{row['seconds']:.0f}",
        ]
        for name, row in data["environments"].items()
    }
    note = (
        f"\nNew virtual environments of Python {data['versions']['python']}, with the CPU build of torch where there is one; "
        "seconds with the packages near at hand, so that the network counts for little (`results/installs.json`)."
    )
    return "\n".join([*table("environment", ["MB", "packages", "seconds"], lines), note])


def full_width(data: dict[str, Any]) -> str:
    """Seconds and memory of each stage at Stable Diffusion's size."""
    lines = {name: [f"{row['seconds']:.0f}", f"{row['peak_gb']:.1f}"] for name, row in data["stages"].items()}
    apart = ", ".join(f"{name} {value:.3f}" for name, value in data["relative_difference_to_fp32"].items())
    note = (
        f"\nThe UNet of Stable Diffusion 1.5 at full width with random weights, latents of 64x64, 4 steps, guidance; 2 CPU "
        f"cores without VNNI. ONNX file {data['onnx_bytes'] / 1e9:.1f} GB. Difference of the latents to FP32's, relative: "
        f"{apart} (`results/sd15_cpu.json`)."
    )
    return "\n".join([*table("stage", ["seconds", "memory, GB"], lines), note])
