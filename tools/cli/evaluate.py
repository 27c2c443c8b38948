"""`modiff-trt evaluate`: measures one image set into a results file, and prints the paper's table beside that file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modiff_trt.core.errors import InputError, one_line
from modiff_trt.core.files import CONTENT, locked, read_result, signed, write_signed
from modiff_trt.tools.cli.options import Device

PAPER = "paper_cifar10.yml"
CHUNKS = ("shuffled", "consecutive")
SHOWN = ("IS", "FID", "sFID")
FIGURES = ("psnr_db", "ssim", "fd-cifar", "inception", "inception-tensorflow")
# Below the number of Inception's features its covariance has no full rank.
FEW = 2048


def evaluate(
    samples: Annotated[Path, typer.Option(help="images to judge: a folder of pictures or shards, or an .npz")],
    out: Annotated[Path, typer.Option(help="JSON file that the result is added to")],
    reference: Annotated[
        Path | None, typer.Option(help="real images: a folder, .npz, cifar-10-binary.tar.gz, or pytorch-fid's statistics")
    ] = None,
    same_noise: Annotated[
        Path | None, typer.Option(help="images from the same seed, of full precision, say, for PSNR and SSIM")
    ] = None,
    features: Annotated[
        str, typer.Option(help="comma-separated: fd-cifar (shipped), inception (FID, sFID, IS); or none")
    ] = "fd-cifar",
    inception: Annotated[Path | None, typer.Option(help="weights of pytorch-fid's Inception; downloaded otherwise")] = None,
    resize: Annotated[str, typer.Option(help="of inception: torch as pytorch-fid, tensorflow as torch-fidelity")] = "torch",
    inception_chunks: Annotated[
        str, typer.Option(help="of the Inception Score: shuffled as torch-fidelity, or consecutive: in the order of the files")
    ] = "shuffled",
    paper: Annotated[bool, typer.Option("--paper", help="the paper's figures beside any model, not its own alone")] = False,
    name: Annotated[str | None, typer.Option(help="of this set in the results; the folder's name by default")] = None,
    batch_size: Annotated[int, typer.Option(help="images read together")] = 100,
    device: Device = "cpu",
) -> None:
    """Measure FID, sFID, IS, FD-CIFAR, PSNR and SSIM of an image set."""
    from modiff_trt.runtime.backends.registry.options import check_device
    from modiff_trt.runtime.images.sets import open_images
    from modiff_trt.tools.evaluation.measures import (
        FULL,
        check_pairs,
        describe,
        distances,
        label,
        measure,
        measures_of,
        open_features,
        open_reference,
        paired,
        reference_statistics,
    )
    from modiff_trt.tools.provenance import provenance

    if reference is None and same_noise is None:
        raise InputError("nothing to compare with: pass --reference (real images), --same-noise (images of its seed), or both")
    if batch_size < 1:
        raise InputError("--batch-size must be at least 1")
    if inception_chunks not in CHUNKS:
        raise InputError(f"--inception-chunks must be one of {', '.join(CHUNKS)}, found '{inception_chunks}'")
    check_device(device)
    images = open_images(samples)
    exact = open_images(same_noise) if same_noise is not None else None
    real = open_reference(reference) if reference is not None else None
    names = [part.strip() for part in features.split(",")] if features != "none" else []
    if repeated := [part for part in names if names.count(part) > 1]:
        raise InputError(f"--features names {repeated[0]} twice")
    wanted = [open_features(part, inception, device, resize=resize) for part in names]
    if "fd-cifar" in names and images.shape != (32, 32):
        raise InputError(
            f"{samples} holds images of {images.shape}, FD-CIFAR is for 32 x 32; use --features inception, or none"
        )
    if not wanted and exact is None:
        raise InputError("--features none leaves PSNR and SSIM, which need --same-noise")
    sources = [real.source(network) for network in wanted] if real is not None else []
    entry: dict[str, Any] = describe(images) | provenance(device)
    place = _printable(name or (samples.name if samples.is_dir() else samples.stem))
    if not _shows({"sets": {place: entry}}):
        raise InputError(f"the manifest of {samples} is damaged; sample again, or evaluate the images from another folder")
    before = _results(out)["sets"].get(place)
    if before is not None and before["made by"] != entry["made by"]:
        raise InputError(f"{out} has a set '{place}' that was made otherwise; pass --name, or choose another --out")
    if before is not None and not _same_images(before, entry):
        measured = {network.name for network in wanted} | ({"psnr_db", "ssim"} if exact is not None else set())
        if left := [key for key in FIGURES if key in before and key not in measured]:
            raise InputError(
                f"{out} has {', '.join(left)} of other images under the name '{place}'; pass --name, or measure these again too"
            )
    how = check_pairs(images, exact) if exact is not None else ""
    notes = [*images.notes, *(exact.notes if exact is not None else ()), *_notes(real)]
    if exact is not None:
        notes += [f"{samples.name} and {exact.path.name} are paired {how}"] if how != "by name" else []
        pairs = {"with": label(exact), "set": exact.path.name, "paired": how, "images_sha256": exact.content_sha256()}
        pairs["manifest_sha256"] = signed(exact.manifest)[CONTENT]
        entry |= {"pairs": {key: _printable(value) for key, value in pairs.items()}}
        entry |= paired(images, exact, batch_size, device=device)
        _record(out, place, entry)
    if wanted and images.count < FEW:
        notes.append(
            f"{images.count} images are few for a Frechet distance, which grows as they get fewer; compare equal numbers"
        )
    if real is not None and real.of_guided_diffusion and "inception" in names and resize == "torch":
        notes.append("the reference's statistics were made with TensorFlow's resizing; --resize tensorflow fits them")
    for number, network in enumerate(wanted):
        own = measure(images, network, batch_size, score=True, consecutive=inception_chunks == "consecutive")
        found: dict[str, Any] = {"weights_sha256": network.digest}
        if measures_of(network).score is not None:
            found |= {"published weights": getattr(network, "published", False)}
        if own.score is not None:
            found |= {"IS": own.score[0], "IS deviation": own.score[1], "IS chunks": inception_chunks}
        if reference is not None and real is not None:
            source = sources[number]
            given = source is real.statistics
            against = real.statistics if given else reference_statistics(source, network, batch_size)  # type: ignore[arg-type]
            assert against is not None
            found |= distances(own, against, network)
            found |= {"reference": _printable(reference.name), "reference images": against.count}
            found |= {"reference_sha256": real.sha256, "reference statistics sha256": against.sha256()}
            found |= {"reference statistics": "of the file" if given else "of its images"}
        if exact is not None:
            baseline = reference_statistics(exact, network, batch_size)
            key = "to full precision" if label(exact) == FULL else "to its pair"
            found[key] = distances(own, baseline, network)
        entry[network.name] = found
        _record(out, place, entry)  # what was measured is kept if the next features fail
    for note in notes:
        typer.echo(one_line(note), err=True)
    Console().print(make_table(_results(out), paper))


def _notes(reference: Any) -> tuple[str, ...]:
    return reference.images.notes if reference is not None and reference.images is not None else ()


def _printable(name: str) -> str:
    """A name that may hold bytes that are no UTF-8, as JSON and a terminal can show it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _record(path: Path, place: str, entry: dict[str, Any]) -> None:
    """Adds a set to the results file as it is now, beside what other features have said of the very same images. Another
    process that adds to the file waits."""
    with locked(path.parent):
        results = _results(path)
        current = results["sets"].get(place, {})
        results["sets"][place] = current | entry if current and _same_images(current, entry) else entry
        write_signed(path, results)


def _results(path: Path) -> dict[str, Any]:
    """What a results file holds so far. Raises InputError if it is none of this command's."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to a file that is not there; choose another --out")
    results = read_result(path, "results") if path.exists() else {"sets": {}}
    if not _shows(results):
        raise InputError(f"{path} is not a results file of `evaluate`; choose another")
    return dict(results)


def _same_images(before: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether two entries are of the same images; those of earlier versions have no digest."""
    digest = entry["images_sha256"]
    return bool(before["images"] == entry["images"] and before.get("images_sha256", digest) == digest)


def _shows(results: Any) -> bool:
    """Whether the table can be made of such results."""
    try:
        rows_of(results)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return False
    return True


def rows_of(results: dict[str, Any], paper_always: bool = False) -> list[list[str]]:
    """One row of text for each set, under HEADINGS. The paper's figures are shown beside images of the paper's checkpoint, or
    with `paper_always` beside any."""
    from modiff_trt.networks.checkpoint import KNOWN_MD5
    from modiff_trt.tools.assets import config_path
    from modiff_trt.tools.evaluation.measures import FULL, method_name

    paper = yaml.safe_load(config_path(PAPER).read_text(encoding="utf-8"))
    rows = []
    for name, entry in results["sets"].items():
        made = entry["made by"]
        quantization = made.get("quantization")
        method = method_name(quantization) if quantization else ""
        bits = f"W{quantization['weight_bits']}A{quantization['act_bits']}" if quantization else ""
        if method == FULL:
            bits = made.get("dtype", "").upper()
        the_paper_s = made.get("checkpoint") in KNOWN_MD5.values() or paper_always
        published = paper.get(method, {}).get(quantization["act_bits"]) if quantization and the_paper_s else None
        empty: dict[str, Any] = {}
        inception = next((entry[key] for key in ("inception", "inception-tensorflow") if key in entry), empty)
        ours = [f"{inception[key]:.2f}" if key in inception else "" for key in SHOWN]
        shown = " / ".join(ours) if any(ours) else ""
        if shown and not inception.get("published weights"):
            shown = "(other weights: see the file)"  # beside the paper's such figures would mislead
        fd = entry.get("fd-cifar", {})
        psnr, ssim = entry.get("psnr_db"), entry.get("ssim")
        rows.append(
            [
                name,
                method,
                bits,
                str(entry["images"]),
                " / ".join(f"{v:.2f}" for v in published) if published else "",
                shown,
                f"{fd['FD-CIFAR']:.4f}" if "FD-CIFAR" in fd else "",
                f"{psnr:.1f}" if psnr is not None else "same" if "psnr_db" in entry else "",
                f"{ssim:.4f}" if ssim is not None else "",
                entry["pairs"]["with"] if "pairs" in entry else "",
                made.get("checkpoint_sha256", "")[:8],
            ]
        )
    return rows


HEADINGS = (
    "set",
    "method",
    "bits",
    "images",
    "paper: IS / FID / sFID",
    "ours",
    "FD-CIFAR",
    "PSNR, dB",
    "SSIM",
    "PSNR and SSIM to",
    "checkpoint",
)


def make_table(results: dict[str, Any], paper: bool = False) -> Table:
    """The results, without columns that are empty in every row."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = rows_of(results, paper)
    shown = [i for i, heading in enumerate(HEADINGS) if any(row[i] for row in rows) or heading == "set"]
    for i in shown:
        table.add_column(HEADINGS[i], justify="left" if HEADINGS[i] in HEADINGS[:3] else "right")
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table
