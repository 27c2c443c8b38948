"""`modiff-trt evaluate`: distances of an image set to a reference set, and to the images of full precision from the same noise.

Images are read batch by batch and features only accumulate, so memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import cache_folder, load_arrays, save_arrays
from modiff_trt.runtime.frechet import Gaussian, InceptionScore, Moments, frechet_distance
from modiff_trt.runtime.image_sets import READ_ERRORS, Images, ImageSet, has_images, open_images
from modiff_trt.tools.progress import progress_bar

KIND, SCHEMA = "feature statistics", 1
FULL = "full precision"


class Features(Protocol):
    """Maps uint8 [n, H, W, 3] to named float arrays [n, d]; `digest` is the SHA-256 of its weights."""

    name: str
    digest: str

    def __call__(self, images: Images) -> dict[str, np.ndarray[Any, Any]]: ...


@dataclass(frozen=True)
class Measures:
    """What a feature network gives: the Frechet distances by array, and the name of the score of its logits, if that is one."""

    distances: dict[str, str]
    score: str | None


MEASURES = {
    "fd-cifar": Measures({"features": "FD-CIFAR"}, None),
    "inception": Measures({"pool": "FID", "spatial": "sFID"}, "IS"),
}
# pytorch-fid's statistics files have no name for their array: it is pool3.
FOREIGN = "pool"
# What two sets of images must share to have begun from the same noise.
SAME = ("seed", "eta", "noise_sha256", "timesteps", "checkpoint_sha256")


def open_features(name: str, weights: Path | None, device: str, resize: str) -> Features:
    """The feature network of a name. Raises InputError if it is unknown or cannot be had."""
    if name == "fd-cifar":
        from modiff_trt.runtime.cifar_features import CifarFeatures
        from modiff_trt.tools.assets import classifier_path

        return CifarFeatures(classifier_path(), device)
    if name == "inception":
        from modiff_trt.runtime.inception import RESIZES, InceptionFeatures

        if resize not in RESIZES:
            raise InputError(f"--resize must be one of {', '.join(RESIZES)}, found '{resize}'")
        return InceptionFeatures(weights, device, resize)
    raise InputError(f"--features must be one of {', '.join(MEASURES)}, found '{name}'")


def measures_of(features: Features) -> Measures:
    return MEASURES[features.name.split("-tensorflow")[0]]


@dataclass(frozen=True)
class Statistics:
    """A Gaussian for every array of features of an image set, and (mean, deviation) of the Inception Score."""

    gaussians: dict[str, Gaussian]
    count: int
    score: tuple[float, float] | None = None


def measure(images: ImageSet, features: Features, batch_size: int, score: bool) -> Statistics:
    """Runs the features over an image set."""
    names = measures_of(features)
    moments = {name: Moments() for name in names.distances}
    inception = InceptionScore(images.count) if score and names.score else None
    with progress_bar() as bar:
        task = bar.add_task(f"{features.name} of {images.path.name}", total=images.count, unit="images")
        for batch in images.batches(batch_size):
            found = features(batch)
            for name, accumulated in moments.items():
                accumulated.add(found[name])
            if inception is not None:
                inception.add(found["logits"])
            bar.advance(task, len(batch))
    gaussians = {name: accumulated.gaussian() for name, accumulated in moments.items()}
    return Statistics(gaussians, images.count, inception.result() if inception is not None else None)


def reference_statistics(images: ImageSet | Statistics, features: Features, batch_size: int) -> Statistics:
    """Statistics of a reference, as `open_reference` gives it: computed once for each content of images and kept in the cache,
    or pytorch-fid's own."""
    if isinstance(images, Statistics):
        if measures_of(features).score is None:
            raise InputError("the reference holds Inception statistics; use --features inception, or pass the images")
        return images
    key = hashlib.sha256(f"{features.name} {features.digest} {images.fingerprint()}".encode()).hexdigest()
    cached = cache_folder() / f"{features.name}-{key[:32]}.safetensors"
    # A cache that is damaged, or cannot be written, costs time and nothing else.
    with contextlib.suppress(InputError, KeyError):
        header, arrays = load_arrays(cached, KIND, SCHEMA)
        count = int(header["count"])
        gaussians = {n: Gaussian(arrays[f"{n}.mean"], arrays[f"{n}.covariance"], count) for n in header["names"]}
        return Statistics(gaussians, count)
    found = measure(images, features, batch_size, score=False)
    arrays = {f"{n}.mean": g.mean for n, g in found.gaussians.items()}
    arrays |= {f"{n}.covariance": g.covariance for n, g in found.gaussians.items()}
    header = {"kind": KIND, "schema": SCHEMA, "count": found.count, "names": list(found.gaussians), "of": str(images.path)}
    with contextlib.suppress(InputError):
        save_arrays(cached, header, arrays)
    return found


def open_reference(path: Path) -> ImageSet | Statistics:
    """The images of a reference, or, of an .npz without images, pytorch-fid's statistics. Raises InputError."""
    if path.suffix != ".npz" or not path.is_file() or has_images(path):
        return open_images(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return Statistics({FOREIGN: Gaussian(file["mu"], file["sigma"], 0)}, 0)
    except (*READ_ERRORS, KeyError):
        return open_images(path)  # which says what is wrong


def distances(found: Statistics, reference: Statistics, features: Features) -> dict[str, float]:
    """Frechet distances by their names, for the arrays that both have."""
    names = measures_of(features).distances
    return {
        shown: frechet_distance(found.gaussians[name], reference.gaussians[name])
        for name, shown in names.items()
        if name in reference.gaussians
    }


def paired(images: ImageSet, exact: ImageSet, batch_size: int, device: str = "cpu") -> dict[str, float | None]:
    """PSNR in dB over all pixels, and mean SSIM, of pairs of 8-bit images from one noise. The PSNR of equal sets, which is
    infinite, is None."""
    if images.count != exact.count or images.shape != exact.shape:
        raise InputError(
            f"{images.path} has {images.count} images of {images.shape}, {exact.path} has {exact.count} of {exact.shape}; "
            "pairs need the same images, made from the same seed"
        )
    mine, theirs = images.manifest, exact.manifest
    unlike = [key for key in SAME if key in mine and key in theirs and mine[key] != theirs[key]]
    if None not in (images.first, exact.first) and images.first != exact.first:
        unlike.append("the first image")
    if unlike:
        raise InputError(
            f"{images.path} and {exact.path} were not made from the same noise: they differ in {', '.join(unlike)}"
        )
    from modiff_trt.runtime.similarity import LEVELS, ssim

    squares, similarity = 0.0, 0.0
    with progress_bar() as bar:
        task = bar.add_task("pairs", total=images.count, unit="images")
        for a, b in zip(images.batches(batch_size), exact.batches(batch_size), strict=True):
            squares += float(((a.astype(np.float64) - b) ** 2).sum())
            similarity += float(ssim(a, b, device).sum())
            bar.advance(task, len(a))
    mse = squares / (images.count * math.prod(images.shape) * 3)
    return {
        "psnr_db": 10 * math.log10(LEVELS**2 / mse) if mse > 0 else None,
        "ssim": similarity / images.count,
    }


def method_name(quantization: dict[str, Any]) -> str:
    """The row of the paper's table that a network belongs to."""
    if quantization["method"] == "float":
        return FULL
    grids = {"static": "Q-Diff", "tensor": "LTQ", "channel": "LCQ"}[quantization["granularity"]]
    return f"{grids} + MoDiff" if quantization["method"] == "modiff" else grids


def describe(images: ImageSet) -> dict[str, Any]:
    """What a set says of itself: its count, a digest of its images and, where it has one, its manifest."""
    return {"images": images.count, "images_sha256": images.content_sha256(), "made by": images.manifest}
