import math
import os
import time

import numpy as np
import pytest

from modiff_trt.export.errors import InputError
from modiff_trt.runtime.images import ImageFolder, ShardFolder, psnr, to_uint8
from modiff_trt.runtime.noise import ImageNoise, load_noise


def test_uint8_rounds_and_clips():
    samples = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 5.0], np.float32).reshape(1, 1, 2, 3)
    assert to_uint8(samples).reshape(-1).tolist() == [0, 0, 128, 255, 255, 255]


def test_psnr_of_a_known_error():
    reference = np.zeros((2, 3, 4, 4), np.float32)
    assert psnr(reference, reference) == math.inf
    assert psnr(reference + 0.2, reference) == pytest.approx(20.0)  # 0.1 of the range [0, 1]
    assert psnr(reference + 5, reference + 1) == math.inf  # clipped first


def test_noise_depends_on_seed_and_index_alone():
    a = ImageNoise(3, range(5), (3, 4, 4)).draw()
    b = ImageNoise(3, [4, 2], (3, 4, 4)).draw()
    np.testing.assert_array_equal(a[[4, 2]], b)
    assert not np.array_equal(a[0], ImageNoise(4, [0], (3, 4, 4)).draw()[0])
    many = ImageNoise(0, range(400), (3, 8, 8)).draw()
    assert many.dtype == np.float32 and abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


def test_noise_file(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3, 5, 5), np.float32))
    assert load_noise(tmp_path / "x.npy", 2, (3, 5, 5)).shape == (2, 3, 5, 5)
    for bad in (np.ones((4, 3, 5, 5)), np.ones((1, 3, 5, 5), np.float32), np.full((4, 3, 5, 5), np.nan, np.float32)):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(InputError):
            load_noise(tmp_path / "bad.npy", 2, (3, 5, 5))


def test_a_longer_shard_takes_the_place_of_one_that_a_killed_run_left(tmp_path):
    folder = ShardFolder(tmp_path, {})
    folder.save([0, 1], np.zeros((2, 3, 4, 4), np.float32))
    short = (tmp_path / "images-000000-000001.npy").read_bytes()
    folder.save([0, 1, 2], np.zeros((3, 3, 4, 4), np.float32))
    (tmp_path / "images-000000-000001.npy").write_bytes(short)  # as if killed before it was deleted
    again = ShardFolder(tmp_path, {})
    assert again.missing([0, 1, 2]) == [] and [f.name for f in tmp_path.glob("*.npy")] == ["images-000000-000002.npy"]


def test_what_killed_processes_left_goes_after_an_hour(tmp_path):
    for name, age in ((".00001.png.x.part", 7200), (".00002.png.x.part", 60), (".video.mp4.part", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    ImageFolder(tmp_path, {})
    assert sorted(f.name for f in tmp_path.iterdir()) == [".00002.png.x.part", ".video.mp4.part", "manifest.json"]


def test_a_manifest_without_images_does_not_claim_a_folder(tmp_path):
    made = {"seed": 0, "batch_size": 1}
    ImageFolder(tmp_path, made | {"eta": 1})
    folder = ImageFolder(tmp_path, made | {"eta": 0})
    folder.save([0], np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(InputError, match="another run"):
        ImageFolder(tmp_path, made | {"eta": 1})


def test_the_manifest_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(InputError, match="not of a set of images"):
        ImageFolder(tmp_path, {"seed": 0, "eta": 0, "batch_size": 1})
    assert (tmp_path / "manifest.json").read_text() == '{"name": "an app"}'


def test_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "holiday.png").touch()
    with pytest.raises(InputError, match="without a manifest"):
        ImageFolder(tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.png"]
