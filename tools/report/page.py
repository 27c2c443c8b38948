"""The report as one HTML page that needs no network: what was quantized, how good it is, how fast, and where the error sits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.tools.cli.evaluate import HEADINGS, rows_of
from modiff_trt.tools.report.data import Comparison
from modiff_trt.tools.report.inspecting import CURVE_HEADINGS, curve_rows, curve_title
from modiff_trt.tools.report.look import SCRIPT, STYLE
from modiff_trt.tools.report.plots import drift, eps_errors, mode_curve
from modiff_trt.tools.report.sections import (
    card,
    engine,
    error_ratio,
    folded,
    layers,
    ranges,
    same_noise,
    speed,
    step_by_step,
    table,
    tile,
    viewer,
)

# PSNR in dB from which on a sentence is true of images; the last holds below.
GRADES = (
    (50.0, "No eye tells these images from those of full precision"),
    (40.0, "Side by side no eye sees a difference"),
    (30.0, "Small differences show where one looks for them"),
    (float("-inf"), "The images differ visibly"),
)


def verdict(comparison: Comparison, scales: Scales) -> str:
    """What the figures say, in three sentences: how good, beside what, and what limits it."""
    _, plain, modulated = comparison.traces
    decibels, without, weights = comparison.psnr(modulated), comparison.psnr(plain), comparison.weights_alone
    grade = next(words for least, words in GRADES if decibels >= least)
    said = [f"{grade}: they are {decibels:.1f} dB from it, and {plain.name} reaches {without:.1f} dB from the same noise."]
    if weights <= decibels + 10 * log10(2):
        said.append(
            f"The rounded weights limit it: with exact activations they alone reach {weights:.1f} dB, whatever is done to the "
            "activations."
        )
        if any(layer.round_up is None for layer in scales.layers.values() if layer.mode != Mode.FLOAT):
            said.append("AdaRound (--preset exact) helps against that.")
    else:
        said.append(f"The activations limit it: with exact ones the rounded weights would reach {weights:.1f} dB.")
    ratio = error_ratio(comparison, plain, modulated)
    if ratio > 1:
        said.append(
            f"Over the steps {plain.name}'s predicted noise is {ratio:.1f} times as far from full precision's, on average."
        )
    return " ".join(said)


def _numbers(comparison: Comparison, benches: Sequence[dict[str, Any]], state: int) -> str:
    _, plain, modulated = comparison.traces
    tiles = [
        tile(f"{comparison.psnr(plain):.1f} dB", f"{plain.name}: PSNR of the images to FP32"),
        tile(f"{comparison.psnr(modulated):.1f} dB", f"{modulated.name}: the same noise, the same bits", chosen=True),
        tile(f"{comparison.weights_alone:.1f} dB", "the same weights with exact activations"),
        tile(f"{state / 1e6:.1f} MB", "state an image, kept on the device between steps (in FP16)"),
    ]
    for data in benches:
        batch = max(data["batches"], key=int)
        rows = data["batches"][batch]
        best = next((name for name in ("native-auto", "native-modiff") if name in rows), None)
        if best is not None:
            first, ratio = next(iter(rows)), next(iter(rows.values()))["microseconds"] / rows[best]["microseconds"]
            where = data["machine"].get("gpu") or f"{data['machine']['cores']} CPU cores"
            tiles.append(tile(f"{ratio:.2f}x", f"{best} against {first}, batch {batch}, {where}"))
    return f'<div class="numbers">{"".join(tiles)}</div>'


def page(
    comparison: Comparison,
    scales: Scales,
    benches: Sequence[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    plan: dict[str, Any] | None,
    manifest: dict[str, Any],
) -> str:
    """The whole page. `benches`, `evaluation` and `plan` are what other commands wrote; without them a section is left out."""
    modulated = comparison.traces[-1]
    steps = f"{len(comparison.timesteps)} {scales.solver.kind} steps"
    sections = [
        f'<p class="eyebrow">Quantization report</p><h1>{escape(modulated.name)} against full precision</h1>',
        f'<p class="lead">{escape(verdict(comparison, scales))}</p>',
        f'<p class="made">{escape(manifest["model"])}, {steps}, {manifest["date"]}<br>{escape(manifest["command"])}</p>',
        f'<div class="hero">{viewer(comparison)}{_numbers(comparison, benches, manifest["state_bytes_an_image"])}</div>',
        "<h2>The same noise, three ways</h2><p>A sampler runs one network many times. Q-Diffusion quantizes every activation "
        "of every step. MoDiff quantizes what has changed since the step before, which is smaller, and keeps the rest on the "
        "device. Higher PSNR is nearer to full precision.</p>",
        same_noise(comparison),
        "<h2>Step by step</h2>",
        step_by_step(comparison),
        "<h2>Where the error comes from</h2><div class='pair'>",
        card("How far each method's predicted noise is from FP32's, along its own trajectory", eps_errors(comparison)),
        card("How near the images on their way are to FP32's", drift(comparison)),
        ranges(scales),
        "</div>",
        "<h2>What runs how</h2>",
        layers(scales),
    ]
    if scales.curve is not None:
        sections += [
            "<h2>State only where it pays</h2><p>State costs time and buys accuracy. Each point is a mixture of layers with "
            "state and layers without, measured on whole trajectories.</p><div class='pair'>",
            card(curve_title(scales.curve), mode_curve(scales.curve)),
            f'<div class="card">{table(CURVE_HEADINGS, curve_rows(scales.curve))}</div></div>',
        ]
    if benches:
        sections += ["<h2>Speed and memory</h2>", *map(speed, benches)]
    if evaluation is not None:
        sections += [
            "<h2>The paper's table, and ours</h2><p>Ours is another checkpoint than the paper's; FD-CIFAR is a Frechet "
            "distance over a small classifier's features, not FID. Empty cells were not run.</p>",
            f'<div class="card">{table(HEADINGS, rows_of(evaluation))}</div>',
        ]
    if plan is not None:
        sections += ["<h2>The TensorRT engine</h2>", engine(plan)]
    told = escape(json.dumps(manifest, indent=2))
    sections += ["<h2>What it was made from</h2>", folded("manifest, with digests of every file", f"<pre>{told}</pre>")]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(modulated.name)}: report</title>"
    body = "\n".join(["<main>", *sections, f"</main><script>{SCRIPT}</script>"])
    return f'<!doctype html><html lang="en"><head>{head}{title}<style>{STYLE}</style></head><body>{body}</body></html>\n'
