"""Pairs of two sets are the same image of both, however the files are called; the right value is PSNR by numpy."""

import numpy as np
import pytest
from PIL import Image

from modiff_trt.core.errors import InputError
from modiff_trt.runtime.images.pairing import numbers, pair
from modiff_trt.runtime.images.sets import open_images
from modiff_trt.tools.evaluation.measures import paired

COUNT = 12


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)


def write(folder, images, pattern, numbers=range(1000)):
    for number, image in zip(numbers, images, strict=False):
        file = folder / pattern.format(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return open_images(folder)


@pytest.mark.parametrize("pattern", ["sample_{}.png", "{}_ema.png", "{}/0.png", "img-{:05d}.png", "v2_{}.bmp"])
def test_identical_sets_are_identical_whatever_their_names(tmp_path, images, pattern):
    plain, named = write(tmp_path / "a", images, "{}.png"), write(tmp_path / "b", images, pattern)
    assert paired(plain, named, 5)["psnr_db"] is None
    noisy = images ^ np.uint8(3)
    mse = ((images.astype(float) - noisy) ** 2).mean()
    found = paired(write(tmp_path / "c", noisy, pattern), plain, 5)["psnr_db"]
    assert found == pytest.approx(10 * np.log10(255**2 / mse))


def test_a_set_without_names_goes_by_order(tmp_path, images):
    np.savez(tmp_path / "x.npz", arr_0=images)
    without, named = open_images(tmp_path / "x.npz"), write(tmp_path / "a", images, "sample_{}.png")
    assert paired(without, named, 5)["psnr_db"] is None and "by their order" in pair(without, named)
    gaps = write(tmp_path / "g", images, "sample_{}.png", [*range(5), *range(6, 13)])
    with pytest.raises(InputError, match="has gaps"):
        pair(without, gaps)


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("sample_{}.png", range(1, COUNT + 1)), ("x_{}.png", [0, 2, 1, *range(4, 13)]), ("a{}b1.png", [9] * 0)],
)
def test_names_that_do_not_correspond_are_refused(tmp_path, images, pattern, numbers):
    plain = write(tmp_path / "a", images, "{}.png")
    if not list(numbers):
        words = ["apple", "banana", "cherry", "date", "elder", "fig", "grape", "hazel", "iris", "jasmine", "kiwi", "lime"]
        other = tmp_path / "b"
        other.mkdir()
        for word, image in zip(words, images, strict=True):
            Image.fromarray(image).save(other / f"{word}.png")
        other = open_images(other)
    else:
        other = write(tmp_path / "b", images, pattern, numbers)
    with pytest.raises(InputError, match="do not correspond"):
        pair(plain, other)


def test_numbers_are_those_that_differ():
    assert numbers(["v2_1", "v2_10"]) == [(1,), (10,)]
    assert numbers(["a_1", "b_2"]) is None and numbers(["1", "01"]) is None
