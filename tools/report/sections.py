"""The sections of the report, each from what was measured to HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.runtime.images.folders import to_uint8
from modiff_trt.tools.bench.table import not_run
from modiff_trt.tools.cli.building import shown_name
from modiff_trt.tools.report.data import Comparison, Trace
from modiff_trt.tools.report.plots import heat_map, png, strip

FRAMES = 25
GAIN = 4
MODES = {
    Mode.MODIFF: "INT8 with MoDiff state",
    Mode.INT8: "INT8, without state",
    Mode.FLOAT: "floating point: it moves data more than it computes",
}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def card(caption: str, content: str) -> str:
    return f'<figure class="card"><figcaption>{escape(caption)}</figcaption>{content}</figure>'


def tile(figure: str, what: str, chosen: bool = False) -> str:
    return f'<div class="card tile{" chosen" if chosen else ""}"><b>{escape(figure)}</b><span>{escape(what)}</span></div>'


def bars(values: Mapping[str, float], unit: str, best: str | None = None) -> str:
    """Horizontal bars with their figures; `best` has the page's accent."""
    largest = max(values.values(), default=0.0) or 1.0
    rows = []
    for name, value in values.items():
        shown = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        mark = ' class="best"' if name == best else ""
        rows.append(
            f"<span>{escape(name)}</span><i{mark} style='width:{100 * value / largest:.1f}%'></i><span>{shown} {unit}</span>"
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def viewer(comparison: Comparison) -> str:
    """One image at a time, full precision under a quantized one that a handle draws over it."""
    exact, *quantized = comparison.traces
    sheets = {f"images{i}": png(strip(to_uint8(trace.samples))) for i, trace in enumerate(comparison.traces)}
    count, _, height, width = exact.samples.shape
    variables = "".join(f"--{name}:url({url});" for name, url in sheets.items())
    size = f"background-size:{100 * count}% 100%"
    names = "".join(
        f'<button class="method" data-images="images{i}" aria-pressed="{str(i == len(quantized)).lower()}">{escape(t.name)}</button>'
        for i, t in enumerate(quantized, 1)
    )
    place = [f"{100 * k / (count - 1) if count > 1 else 0:.3f}% 0" for k in range(count)]
    thumbs = "".join(
        f'<button class="thumb" aria-label="image {k}" aria-pressed="{str(k == 0).lower()}" '
        f'style="background-image:var(--images0);{size};background-position:{place[k]}"></button>'
        for k in range(count)
    )
    return (
        f'<div class="card" style="--shape:{width}/{height};{variables}"><div class="viewer">'
        f'<div class="of" style="background-image:var(--images0);{size}"></div>'
        f'<div class="of over" style="background-image:var(--images{len(quantized)});{size}"></div><div class="edge"></div>'
        f'<small class="left">{escape(exact.name)}</small><small class="right">{escape(quantized[-1].name)}</small></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="how much of the quantized image is shown">'
        f'<div class="choices">{names}</div><div class="choices">{thumbs}</div></div>'
    )


def same_noise(comparison: Comparison) -> str:
    """Each method's images in a row, and how they differ from full precision's."""
    exact = to_uint8(comparison.traces[0].samples).astype(np.int16)
    rows, apart = [], []
    for trace in comparison.traces:
        images = to_uint8(trace.samples)
        said = "the reference" if trace is comparison.traces[0] else f"{comparison.psnr(trace):.1f} dB"
        rows.append(_row(trace.name, said, strip(images), f"images of {trace.name}"))
        if trace is not comparison.traces[0]:
            grey = np.clip(128 + GAIN * (images.astype(np.int16) - exact), 0, 255).astype(np.uint8)
            apart.append(_row(trace.name, "", strip(grey), f"differences of {trace.name} to FP32"))
    style = f'style="--count:{len(exact)}"'
    shown = folded(
        f"their differences to FP32, times {GAIN} (grey is none)", f'<div class="rows" {style}>{"".join(apart)}</div>'
    )
    return f'<div class="card"><div class="rows" {style}>{"".join(rows)}</div>{shown}</div>'


def _row(name: str, said: str, picture: np.ndarray[Any, Any], what: str) -> str:
    return f'<span><b>{escape(name)}</b>{escape(said)}</span><img alt="{escape(what)}" src="{png(picture)}">'


def step_by_step(comparison: Comparison) -> str:
    """The images on their way from noise, with a slider over the steps."""
    chosen = np.unique(np.linspace(0, len(comparison.timesteps) - 1, FRAMES).round().astype(int))
    labels = [f"before step {k + 1} of {len(comparison.timesteps)} (t = {comparison.timesteps[k]})" for k in chosen]
    labels.append(f"after step {len(comparison.timesteps)}: the images")
    parts = []
    for trace in comparison.traces:
        frames = [strip(to_uint8(trace.x[k])) for k in chosen] + [strip(to_uint8(trace.samples))]
        height, width = frames[0].shape[:2]
        sheet = f'<img alt="{escape(trace.name)} over the steps" src="{png(np.concatenate(frames))}">'
        parts.append(
            f'<span><b>{escape(trace.name)}</b></span><div class="frames" style="--ratio:{width}/{height}">{sheet}</div>'
        )
    steps = escape(json.dumps(labels), quote=True)
    control = (
        f'<label class="quiet"><span id="where">{escape(labels[-1])}</span><input id="step" type="range" min="0" max="{len(chosen)}" '
        f'value="{len(chosen)}" data-steps="{steps}"></label>'
    )
    count = len(comparison.traces[0].samples)
    return f'<div class="card">{control}<div class="rows" style="--count:{count}">{"".join(parts)}</div></div>'


def ranges(scales: Scales) -> str:
    """Two heat maps on one scale: what the grids of static quantization must span, and those of MoDiff."""
    both = (("activation", scales.activation_range), ("residual", scales.residual_range))
    positive = np.concatenate([data[data > 0] for _, data in both])
    ends = float(positive.min()), float(positive.max())
    names = list(scales.layers)
    steps = [scales.rows.timesteps[int(s)] for s in scales.range_steps]
    captions = (
        "What Q-Diffusion's grids must span: the largest activation",
        "What MoDiff's must span: the largest change since the step before (blank: none)",
    )
    parts = []
    for (what, data), caption in zip(both, captions, strict=True):
        values = [[float(f"{v:.3g}") if v > 0 else None for v in row] for row in data.T.tolist()]
        content = escape(json.dumps({"names": names, "steps": steps, "values": values}), quote=True)
        picture = heat_map(data.T, ends)
        shown = (
            f'<div class="map" data-map="{content}"><img alt="largest {what} of each layer at each step" src="{picture}"><i></i></div>'
            f'<div class="ends"><span>t = {steps[0]}, noise</span><span>layers from top to bottom</span><span>t = {steps[-1]}</span></div>'
            f'<div class="read quiet">dark {ends[0]:.2g}, light {ends[1]:.2g}; point at a layer</div>'
        )
        parts.append(card(caption, shown))
    return "".join(parts)


def layers(scales: Scales) -> str:
    """Every layer in order of execution, by its mode; its name shows when it is pointed at."""
    modes = [layer.mode for layer in scales.layers.values()]
    cells = "".join(
        f'<i class="{layer.mode}" title="{escape(name)}: {MODES[layer.mode]}, W{layer.weight_bits}A{layer.act_bits}"></i>'
        if layer.mode != Mode.FLOAT
        else f'<i class="float" title="{escape(name)}: {MODES[layer.mode]}"></i>'
        for name, layer in scales.layers.items()
    )
    key = "".join(
        f'<span><i class="{mode}"></i>{modes.count(mode)} {what}</span>' for mode, what in MODES.items() if mode in modes
    )
    strip_of = f'<div class="layers">{cells}</div><div class="key">{key}</div><div class="read quiet">point at a layer</div>'
    return card(f"The {len(modes)} layers, from input to output", strip_of)


def speed(data: dict[str, Any]) -> str:
    """What `bench` measured on one machine."""
    where = data["machine"].get("gpu") or f"{data['machine']['cores']} CPU cores ({data['machine']['processor']})"
    batches = sorted(data["batches"].items(), key=lambda item: int(item[0]))
    best = next((name for name in ("native-auto", "native-modiff") if all(name in rows for _, rows in batches)), None)
    parts = [f"<h3>{escape(where)}, {escape(str(data['config']))}</h3><div class='pair'>"]
    for batch, rows in batches:
        times = {name: row["microseconds_an_image"] for name, row in rows.items()}
        parts.append(card(f"time of one pass at batch {batch}, an image", bars(times, "us", best)))
    memory = {name: row["memory_bytes"] / 1e9 for name, row in batches[-1][1].items() if row["memory_bytes"]}
    if memory:
        parts.append(card(f"GPU memory at batch {batches[-1][0]}, weights and state included", bars(memory, "GB", best)))
    for batch, profile in data.get("profiles", {}).items():
        kinds = {name: row["microseconds_an_image"] for name, row in profile["classes"].items()}
        parts.append(card(f"where native-modiff spends its pass at batch {batch}, an image", bars(kinds, "us")))
    headings = ["batch", "backend", "us a pass, p50", "p95", "images/s", "ratio", "state, MB an image"]
    floors = any("share_of_floor" in row for _, rows in batches for row in rows.values())
    lines = []
    for batch, rows in batches:
        first = next(iter(rows.values()))["microseconds"]
        for name, row in rows.items():
            floor = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""
            tail = f"{row['microseconds_p95']:,.0f}" if "microseconds_p95" in row else ""
            cells = [batch, name, f"{row['microseconds']:,.0f}", tail, f"{row['images_a_second']:,.1f}"]
            state = f"{row['state_bytes_an_image'] / 1e6:.1f}"
            lines.append([*cells, f"{first / row['microseconds']:.2f}x", state, *([floor] if floors else [])])
    headings += ["floor / time"] if floors else []
    missing = "".join(f"<li>{escape(line)}</li>" for line in not_run(data))
    rest = folded("all figures", table(headings, lines))
    return "".join(parts) + "</div>" + rest + (f"<p class='quiet'>Not run:</p><ul>{missing}</ul>" if missing else "")


def engine(manifest: dict[str, Any]) -> str:
    """What `build` reports of a plan."""
    report = manifest["report"]
    rows = [
        [
            shown_name(layer),
            layer["kind"],
            ", ".join(layer["inputs"][:2]),
            ", ".join(layer["outputs"][:2]),
            layer["tactic"],
        ]
        for layer in report["table"]
    ]
    summary = (
        f"{report['layers']} layers; {report['plugin_layers']} plugins and {report['quantized_layers_in_int8']} INT8 "
        f"convolutions of {report['quantized_layers']} quantized layers."
    )
    shown = folded("every layer", table(("of", "kind", "inputs", "outputs", "kernel"), rows))
    return f'<div class="card"><p>{escape(manifest["runtime"])}. {escape(summary)}</p>{shown}</div>'


def error_ratio(comparison: Comparison, plain: Trace, modulated: Trace) -> float:
    """How many times as far from FP32's the predicted noise of one method is as the other's, in the geometric mean."""
    errors = [np.log(np.maximum(comparison.eps_error(trace)[1:], 1e-12)).mean() for trace in (plain, modulated)]
    return float(np.exp(errors[0] - errors[1]))
