"""`modiff-trt evaluate`: distances of an image set to a reference set, and to the images of another set from the same noise.

Images are read batch by batch and features only accumulate, so memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import cache_folder, digest_of, load_arrays, save_arrays
from modiff_trt.core.kinds import UNQUANTIZED, Granularity, Method
from modiff_trt.core.manifest import Quantization
from modiff_trt.core.npy import read_npz
from modiff_trt.core.progress import progress_bar
from modiff_trt.runtime.images.folders import decibels
from modiff_trt.runtime.images.pairing import pair
from modiff_trt.runtime.images.pictures import Images
from modiff_trt.runtime.images.sets import NPZ_KEYS, ImageSet, open_images
from modiff_trt.tools.evaluation.frechet import Gaussian, InceptionScore, Moments, frechet_distance

KIND, SCHEMA = "feature statistics", 2
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
# Statistics files of other tools: the array that each pair of theirs is of, and its size. pytorch-fid's have the first pair,
# guided-diffusion's reference batches both.
FOREIGN = {"pool": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 2023)}
# What two sets of images must share to have begun from the same noise.
SAME = ("seed", "eta", "noise_sha256", "timesteps", "checkpoint_sha256")


def open_features(name: str, weights: Path | None, device: str, resize: str) -> Features:
    """The feature network of a name. Raises InputError if it is unknown or cannot be had."""
    if name == "fd-cifar":
        from modiff_trt.tools.assets import classifier_path
        from modiff_trt.tools.evaluation.cifar_features import SHIPPED_SHA256, CifarFeatures

        return CifarFeatures(classifier_path(), device, SHIPPED_SHA256)
    if name == "inception":
        from modiff_trt.tools.evaluation.inception import RESIZES, InceptionFeatures

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

    def sha256(self) -> str:
        """Digest of every mean and covariance."""
        digest = hashlib.sha256()
        for name, found in sorted(self.gaussians.items()):
            digest.update(name.encode() + found.mean.tobytes() + found.covariance.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """What a set is compared with: images, statistics that another tool made of some, or both in one file."""

    path: Path
    images: ImageSet | None
    sha256: str
    statistics: Statistics | None = None

    @property
    def of_guided_diffusion(self) -> bool:
        return self.statistics is not None and "spatial" in self.statistics.gaussians

    def source(self, features: Features) -> ImageSet | Statistics:
        """What the distances of these features come from: statistics where the file has them, as the tools that write them
        do. Raises InputError if it has neither for these features."""
        inception = measures_of(features).score is not None
        if inception and self.statistics is not None:
            return self.statistics
        if self.images is None:
            raise InputError(
                f"the reference {self.path} holds Inception statistics; use --features inception, or pass the images"
            )
        return self.images


def measure(images: ImageSet, features: Features, batch_size: int, score: bool, consecutive: bool = False) -> Statistics:
    """Runs the features over an image set. Raises InputError if the files change meanwhile."""
    names = measures_of(features)
    moments = {name: Moments() for name in names.distances}
    inception = InceptionScore(images.count, consecutive=consecutive, ranks=images.ranks) if score and names.score else None
    images.check_unchanged()
    with progress_bar() as bar:
        task = bar.add_task(f"{features.name} of {images.path.name}", total=images.count, unit="images")
        for batch in images.batches(batch_size):
            found = features(batch)
            for name, accumulated in moments.items():
                accumulated.add(found[name])
            if inception is not None:
                inception.add(found["logits"])
            bar.advance(task, len(batch))
    images.check_unchanged()
    gaussians = {name: accumulated.gaussian() for name, accumulated in moments.items()}
    return Statistics(gaussians, images.count, inception.result() if inception is not None else None)


def reference_statistics(images: ImageSet, features: Features, batch_size: int) -> Statistics:
    """Statistics of a reference, computed once for each content of images and kept in the cache."""
    key = hashlib.sha256(f"{features.name} {features.digest} {images.content_sha256()}".encode()).hexdigest()
    cached = cache_folder() / f"{features.name}-{key[:32]}.safetensors"
    # A cache that is damaged, or cannot be written, costs time and nothing else.
    with contextlib.suppress(InputError):
        return load_statistics(cached, features)
    found = measure(images, features, batch_size, score=False)
    with contextlib.suppress(InputError):
        save_statistics(cached, found, features, of=os.fsencode(images.path).decode("utf-8", "replace"))
    return found


def save_statistics(path: Path, found: Statistics, features: Features, of: str) -> None:
    """Writes the Gaussians of these features; `of` says of which images."""
    arrays = {f"{n}.mean": g.mean for n, g in found.gaussians.items()}
    arrays |= {f"{n}.covariance": g.covariance for n, g in found.gaussians.items()}
    header = {"kind": KIND, "schema": SCHEMA, "of": of, "features": features.digest, "count": found.count}
    save_arrays(path, header, arrays)


def load_statistics(path: Path, features: Features) -> Statistics:
    """What `save_statistics` wrote. Raises InputError if it is damaged, or of other features."""
    header, arrays, _ = load_arrays(path, KIND, SCHEMA)
    names = measures_of(features).distances
    if header.get("features") != features.digest or type(header.get("count")) is not int:
        raise InputError(f"{path} holds statistics of other features than {features.name}; measure the images again")
    try:
        count = header["count"]
        gaussians = {n: Gaussian(arrays[f"{n}.mean"], arrays[f"{n}.covariance"], count) for n in names}
    except KeyError as error:
        raise InputError(f"{path} lacks {error}; measure the images again") from None
    if not all(_is_sound(g) for g in gaussians.values()):
        raise InputError(f"{path} holds no covariance of finite numbers; measure the images again")
    return Statistics(gaussians, count)


def _is_sound(found: Gaussian) -> bool:
    sizes = found.mean.ndim == 1 and found.covariance.shape == 2 * found.mean.shape
    return sizes and bool(np.isfinite(found.mean).all() and np.isfinite(found.covariance).all())


def open_reference(path: Path) -> Reference:
    """The images of a reference, and the statistics that pytorch-fid or guided-diffusion have put into an .npz. Raises
    InputError, also for statistics of another layout."""
    if path.suffix != ".npz" or not path.is_file():
        images = open_images(path)
        return Reference(path, images, images.content_sha256())
    names = [name for mean, covariance, _ in FOREIGN.values() for name in (mean, covariance)]
    found, data = read_npz(path, names, "reference")
    gaussians = {}
    for name, (mean, covariance, size) in FOREIGN.items():
        if (mean in found) != (covariance in found):
            raise InputError(f"{path} has half of its statistics: one of {mean} and {covariance} is missing")
        if mean in found:
            gaussians[name] = _gaussian(path, found[mean], found[covariance], size=size)
    if gaussians and "pool" not in gaussians:
        raise InputError(f"{path} has statistics for sFID (mu_s, sigma_s) and none for FID (mu, sigma)")
    statistics = Statistics(gaussians, 0) if gaussians else None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pictures = any(f"{key}.npy" in archive.namelist() for key in NPZ_KEYS)
    return Reference(path, open_images(path) if pictures or not gaussians else None, digest_of(data), statistics=statistics)


def _gaussian(path: Path, mean: np.ndarray[Any, Any], covariance: np.ndarray[Any, Any], size: int) -> Gaussian:
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise InputError(
            f"{path} has statistics of the shapes {mean.shape} and {covariance.shape}; {size} features are compared here, so "
            f"that ({size},) and ({size}, {size}) are needed"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(f"{path} has statistics of the types {mean.dtype} and {covariance.dtype}; floating point is needed")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path} has statistics that are not finite; make them again")
    largest = float(np.abs(covariance).max())
    if (np.diag(covariance) < -1e-6 * largest).any() or np.abs(covariance - covariance.T).max() > 1e-6 * largest:
        raise InputError(f"{path} has a matrix that is no covariance: it is not symmetric, or has negative variances")
    return Gaussian(mean, covariance, 0)


def distances(found: Statistics, reference: Statistics, features: Features) -> dict[str, float]:
    """Frechet distances by their names, for the arrays that both have."""
    names = measures_of(features).distances
    return {
        shown: frechet_distance(found.gaussians[name], reference.gaussians[name])
        for name, shown in names.items()
        if name in reference.gaussians
    }


def check_pairs(images: ImageSet, exact: ImageSet) -> str:
    """How two sets are paired, in words. Raises InputError unless both can have begun from the same noise, image by image."""
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
    return pair(images, exact)


def paired(images: ImageSet, exact: ImageSet, batch_size: int, device: str = "cpu") -> dict[str, float | None]:
    """PSNR in dB over all pixels, and mean SSIM, of pairs of 8-bit images from one noise. The PSNR of equal sets, which is
    infinite, is None. Raises InputError unless they can be paired (see `check_pairs`)."""
    check_pairs(images, exact)
    for used in (images, exact):
        used.check_unchanged()
    from modiff_trt.tools.evaluation.similarity import LEVELS, ssim

    squares, similarity = 0.0, 0.0
    with progress_bar() as bar:
        task = bar.add_task("pairs", total=images.count, unit="images")
        for a, b in zip(images.batches(batch_size), exact.batches(batch_size), strict=True):
            squares += float(((a.astype(np.float64) - b) ** 2).sum())
            similarity += float(ssim(a, b, device).sum())
            bar.advance(task, len(a))
    for used in (images, exact):
        used.check_unchanged()
    mse = squares / (images.count * math.prod(images.shape) * 3)
    return {
        "psnr_db": decibels(mse, LEVELS) if mse > 0 else None,
        "ssim": similarity / images.count,
    }


GRIDS: dict[str, str] = {Granularity.STATIC: "Q-Diff", Granularity.TENSOR: "LTQ", Granularity.CHANNEL: "LCQ"}


def method_name(quantization: Quantization) -> str:
    """The row of the paper's table that a network belongs to."""
    if quantization["method"] == UNQUANTIZED:
        return FULL
    grids = GRIDS[quantization["granularity"]]
    return f"{grids} + MoDiff" if quantization["method"] == Method.MODIFF else grids


def label(images: ImageSet) -> str:
    """What a set was made by, as far as it says it: `full precision`, a method with its bits and backend, or the name of a set
    of something else."""
    made = images.manifest
    if "quantization" not in made:
        return f"the set {images.path.name}"
    quantization = made["quantization"]
    method = method_name(quantization)
    if method == FULL:
        return FULL
    return f"{made.get('backend', '')} {method} W{quantization['weight_bits']}A{quantization['act_bits']}".strip()


def describe(images: ImageSet) -> dict[str, Any]:
    """What a set says of itself: its count, a digest of its images and, where it has one, its manifest."""
    return {"images": images.count, "images_sha256": images.content_sha256(), "made by": images.manifest}
