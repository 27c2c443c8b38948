"""The report as one HTML page that needs no network: pictures, plots, tables and manifests, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from modiff_trt.core.scales import Scales
from modiff_trt.runtime.images.folders import to_uint8
from modiff_trt.tools.bench.table import not_run
from modiff_trt.tools.cli.building import shown_name
from modiff_trt.tools.cli.evaluate import HEADINGS, rows_of
from modiff_trt.tools.report.data import Comparison, Trace
from modiff_trt.tools.report.inspecting import CURVE_HEADINGS, curve_rows, curve_title
from modiff_trt.tools.report.plots import bars, eps_errors, mode_curve, png, range_map, strip

FRAMES = 25
GAIN = 4

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
p { max-width: 75ch; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tile { flex: 1 1 150px; border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b { font-size: 1.6rem; display: block; line-height: 1.2; }
.tile span { font-size: .85rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.2rem; }
figure { margin: .6rem 0; } figcaption { font-size: .9rem; margin-bottom: .2rem; }
.images img { width: 100%; display: block; image-rendering: pixelated; border: 1px solid var(--line); }
svg { width: 100%; height: auto; max-width: 620px; }
.frames { overflow: hidden; position: relative; border: 1px solid var(--line); }
.frames img { width: 100%; display: block; image-rendering: pixelated; border: 0; }
input[type=range] { width: 100%; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom-width: 2px; }
pre { overflow-x: auto; background: var(--soft); padding: .7rem; font-size: .8rem; } details { margin: .4rem 0; }
"""

SCRIPT = """
const slider = document.getElementById('step');
if (slider) {
  const show = () => {
    const k = +slider.value, steps = JSON.parse(slider.dataset.steps);
    document.querySelectorAll('.frames').forEach(f => {
      const img = f.querySelector('img'); img.style.transform = `translateY(${-100 * k / steps.length}%)`;
      f.style.aspectRatio = f.dataset.ratio; img.style.position = 'absolute';
    });
    document.getElementById('where').textContent = steps[k];
  };
  slider.addEventListener('input', show); show();
}
"""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles) + "</div>"


def _grid(trace: Trace, comparison: Comparison) -> str:
    images = to_uint8(trace.samples)
    if trace is comparison.traces[0]:
        return _figure(f"{trace.name}, the reference", f'<img alt="images of {trace.name}" src="{png(strip(images))}">')
    exact = to_uint8(comparison.traces[0].samples).astype(np.int16)
    difference = np.clip(128 + GAIN * (images.astype(np.int16) - exact), 0, 255).astype(np.uint8)
    caption = f"{trace.name}: {comparison.psnr(trace):.1f} dB to FP32; below, the difference x {GAIN} (grey is none)"
    both = f'<img alt="images of {trace.name}" src="{png(strip(images))}">'
    return _figure(caption, both + f'<img alt="differences of {trace.name} to FP32" src="{png(strip(difference))}">')


def _slider(comparison: Comparison) -> str:
    chosen = np.unique(np.linspace(0, len(comparison.timesteps) - 1, FRAMES).round().astype(int))
    labels = [f"before step {k + 1} of {len(comparison.timesteps)} (t = {comparison.timesteps[k]})" for k in chosen]
    labels.append("the images")
    parts = []
    for trace in comparison.traces:
        frames = [strip(to_uint8(trace.x[k])) for k in chosen] + [strip(to_uint8(trace.samples))]
        height, width = frames[0].shape[:2]
        sheet = f'<img alt="{trace.name} over the steps" src="{png(np.concatenate(frames))}">'
        parts.append(_figure(trace.name, f'<div class="frames" data-ratio="{width}/{height}">{sheet}</div>'))
    steps = escape(json.dumps(labels), quote=True)
    control = (
        f'<label>step: <span id="where"></span><input id="step" type="range" min="0" max="{len(chosen)}" '
        f'value="{len(chosen)}" data-steps="{steps}"></label>'
    )
    return control + '<div class="images">' + "".join(parts) + "</div>"


def bench_section(data: dict[str, Any]) -> str:
    where = data["machine"].get("gpu") or f"{data['machine']['cores']} CPU cores ({data['machine']['processor']})"
    parts = [f"<h3>{escape(where)}, {escape(str(data['config']))}</h3><div class='pair'>"]
    batches = sorted(data["batches"].items(), key=lambda item: int(item[0]))
    for batch, rows in batches:
        times = {name: row["microseconds_an_image"] for name, row in rows.items()}
        drawn = bars(times, "microseconds an image and pass", "Latency", best="native-modiff")
        parts.append(_figure(f"latency at batch {batch}", drawn))
    memory = {name: row["memory_bytes"] / 1e9 for name, row in batches[-1][1].items() if row["memory_bytes"]}
    if memory:
        drawn = bars(memory, "GB of GPU memory, weights and state included", "Memory", best="native-modiff")
        parts.append(_figure(f"memory at batch {batches[-1][0]}", drawn))
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
    return "".join(parts) + "</div>" + table(headings, lines) + (f"<p>Not run:</p><ul>{missing}</ul>" if missing else "")


def engine_section(manifest: dict[str, Any]) -> str:
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
    shown = table(("of", "kind", "inputs", "outputs", "kernel"), rows)
    return f"<p>{escape(manifest['runtime'])}. {escape(summary)}</p><details><summary>every layer</summary>{shown}</details>"


def page(
    comparison: Comparison,
    scales: Scales,
    benches: Sequence[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    plan: dict[str, Any] | None,
    manifest: dict[str, Any],
) -> str:
    """The whole page. `benches`, `evaluation` and `plan` are what other commands wrote; without them a section is left out."""
    _, plain, modulated = comparison.traces
    state = manifest["state_bytes_an_image"]
    tiles = [
        (f"{comparison.psnr(plain):.1f} dB", f"{escape(plain.name)}: PSNR of the images to FP32 from the same noise"),
        (f"{comparison.psnr(modulated):.1f} dB", f"{escape(modulated.name)}: the same, quantizing what changed instead"),
        (f"{state / 1e6:.1f} MB", "state (a_hat, o_hat) an image, kept on the device between steps (in FP16)"),
    ]
    for data in benches:
        batch = max(data["batches"], key=int)
        rows = data["batches"][batch]
        if "native-modiff" in rows:
            first, ratio = next(iter(rows)), next(iter(rows.values()))["microseconds"] / rows["native-modiff"]["microseconds"]
            where = data["machine"].get("gpu") or f"{data['machine']['cores']} CPU cores"
            tiles.append((f"{ratio:.2f}x", f"native INT8 + MoDiff against {escape(first)}, batch {batch}, {escape(where)}"))
    sections = [
        f"<h1>{escape(modulated.name)} against full precision</h1>",
        "<p>A diffusion sampler runs one network many times. Q-Diffusion quantizes every activation of every step; MoDiff "
        "quantizes only what <em>changed</em> since the step before, which is several times smaller, and keeps the rest on the "
        "device. Higher PSNR is nearer to full precision; above 40 dB the eye sees no difference.</p>",
        _tiles(tiles),
        '<h2>The same noise, three ways</h2><div class="images">',
        *(_grid(trace, comparison) for trace in comparison.traces),
        "</div><h2>Step by step</h2>",
        _slider(comparison),
        "<h2>Where the error comes from</h2><div class='pair'>",
        _figure("How far each method's predicted noise is from FP32's, along its own trajectory", eps_errors(comparison)),
        _figure("The range that Q-Diffusion's grids must span", range_map(scales, "activation")),
        _figure(
            "The range that MoDiff's grids must span (same scale; blank: no step before, or no change)",
            range_map(scales, "residual"),
        ),
        "</div>",
    ]
    if scales.curve is not None:
        sections += [
            "<h2>State only where it pays</h2><p>State costs time and buys accuracy. Each point is a mixture of layers with "
            "state and layers without, measured on whole trajectories.</p><div class='pair'>",
            _figure(curve_title(scales.curve), mode_curve(scales.curve)),
            table(CURVE_HEADINGS, curve_rows(scales.curve)),
            "</div>",
        ]
    if benches:
        sections += ["<h2>Speed and memory</h2>", *map(bench_section, benches)]
    if evaluation is not None:
        sections += [
            "<h2>The paper's table, and ours</h2><p>Ours is another checkpoint than the paper's; FD-CIFAR is a Frechet "
            "distance over a small classifier's features, not FID. Empty cells were not run.</p>",
            table(HEADINGS, rows_of(evaluation)),
        ]
    if plan is not None:
        sections += ["<h2>The TensorRT engine</h2>", engine_section(plan)]
    told = escape(json.dumps(manifest, indent=2))
    sections += [f"<h2>What it was made from</h2><details><summary>manifest</summary><pre>{told}</pre></details>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(modulated.name)}: report</title>"
    body = "\n".join([*sections, f"<script>{SCRIPT}</script>"])
    return f'<!doctype html><html lang="en"><head>{head}{title}<style>{STYLE}</style></head><body>{body}</body></html>\n'
