"""`sample --grid`: one picture of the images, beside whatever --out is."""

import numpy as np
import pytest
from command import run
from conftest import ROOT
from PIL import Image

from modiff_trt.runtime.images.pictures import GAP, save_sheet
from modiff_trt.runtime.images.sets import load_images

MODEL = ["--config", ROOT / "configs/demo.yml", "--ckpt", ROOT / "calib_cache/demo/model.safetensors"]


@pytest.mark.parametrize("out", ["images", "images.npz"])
def test_each_image_stands_in_its_place(tmp_path, out):
    job = ["sample", *MODEL, "--timesteps", 2, "--num-samples", 5, "--out", tmp_path / out]
    assert run(*job, "--grid", tmp_path / "sheet.png") == 0
    sheet, images = np.asarray(Image.open(tmp_path / "sheet.png")), load_images(tmp_path / out, 32)
    assert sheet.shape == (3 * 32 + 2 * GAP, 2 * 32 + GAP, 3)
    for i, image in enumerate(images):
        top, left = i // 2 * (32 + GAP), i % 2 * (32 + GAP)
        np.testing.assert_array_equal(sheet[top : top + 32, left : left + 32], image)
    assert (sheet[-32:, -32:] == 255).all()  # no sixth image


def test_a_sheet_of_one_channel_and_of_wide_images(tmp_path):
    images = np.arange(3 * 2 * 7, dtype=np.uint8).reshape(3, 2, 7, 1)
    save_sheet(tmp_path / "s.png", images)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (3 * 2 + 2 * GAP, 7)
    np.testing.assert_array_equal(sheet[:2], images[0, :, :, 0])


@pytest.mark.parametrize("grid", ["images/sheet.png", "sheet.jpg"])
def test_a_wrong_place_is_refused_before_any_work(tmp_path, capsys, grid):
    job = ["sample", *MODEL, "--timesteps", 2, "--num-samples", 1, "--out", tmp_path / "images"]
    assert run(*job, "--grid", tmp_path / grid) == 2
    assert "--grid must be a FILE.png" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
