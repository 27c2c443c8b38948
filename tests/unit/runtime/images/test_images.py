import fcntl
import hashlib
import json
import math
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from modiff_trt.core.errors import InputError
from modiff_trt.runtime.images.folders import ImageFolder, ShardFolder, psnr, to_uint8
from modiff_trt.runtime.images.noise import ImageNoise, load_noise
from modiff_trt.runtime.images.sets import open_images


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
    noise, digest = load_noise(tmp_path / "x.npy", 2, (3, 5, 5))
    assert noise.shape == (2, 3, 5, 5) and digest == hashlib.sha256((tmp_path / "x.npy").read_bytes()).hexdigest()
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


def test_what_killed_processes_left_goes_with_the_next_run(tmp_path):
    """The file of a process that is still writing is locked, and stays; so does what is not ours."""
    for name in (".00001.png.x.part", ".00002.png.x.part", ".video.mp4.part"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 60,) * 2)
    with (tmp_path / ".00002.png.x.part").open() as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        ImageFolder(tmp_path, {})
    assert sorted(f.name for f in tmp_path.glob("*.part")) == [".00002.png.x.part", ".video.mp4.part"]


def test_what_was_too_young_to_be_deleted_goes_when_the_run_ends(tmp_path):
    """A file of the instant before a run begins may still be written by another process."""
    left = tmp_path / ".00001.png.x.part"
    left.touch()
    with ImageFolder(tmp_path, {}) as folder:
        assert left.exists()
        os.utime(left, (time.time() - 10,) * 2)
        folder.save([0, 1], np.zeros((2, 3, 4, 4), np.float32))
    assert not left.exists()


def test_writing_an_image_does_not_read_the_whole_folder(tmp_path):
    """Or else 50,000 images would take a time that grows with the square of their number."""
    listed: list[str] = []
    watching = False

    def audit(event: str, _: object) -> None:
        if watching and event in ("os.scandir", "os.listdir"):
            listed.append(event)

    sys.addaudithook(audit)
    with ImageFolder(tmp_path, {}) as folder:
        watching = True
        folder.save(list(range(20)), np.zeros((20, 3, 4, 4), np.float32))
        in_between = len(listed)
        any(tmp_path.glob("*.png"))
        watching = False
    assert in_between == 0 and listed  # the second: this Python says so where a folder is read


def test_a_manifest_without_images_does_not_claim_a_folder(tmp_path):
    made = {"seed": 0, "batch_size": 1}
    ImageFolder(tmp_path, made | {"eta": 1}).close()
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


def test_a_folder_belongs_to_one_run_from_its_first_moment(tmp_path):
    """A second run that begins before the first has written an image must not put its manifest in place of the first one's."""
    made = {"seed": 0, "eta": 0, "batch_size": 1}
    first = ImageFolder(tmp_path / "x", made)
    with pytest.raises(InputError, match="is writing into"):
        ImageFolder(tmp_path / "x", made | {"seed": 1})
    with ImageFolder(tmp_path / "x", made) as rank:  # another process of the same job
        rank.save([1], np.zeros((1, 3, 4, 4), np.float32))
    first.save([0], np.zeros((1, 3, 4, 4), np.float32))
    first.close()
    assert json.loads((tmp_path / "x/manifest.json").read_text())["seed"] == 0
    assert not (tmp_path / "x/.lock").exists() and len(list((tmp_path / "x").glob("*.png"))) == 2


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    with pytest.raises(MemoryError), ImageFolder(tmp_path / "x", {}):
        raise MemoryError
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", [ImageFolder, ShardFolder])
def test_what_was_altered_since_is_refused_and_what_is_not_listed_is_made_again(tmp_path, kind):
    made = {"seed": 0, "eta": 0, "batch_size": 2}
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)
    with kind(tmp_path, made) as folder:
        folder.save([0, 1], samples)
    images = np.concatenate(list(open_images(tmp_path).batches(2)))
    file = sorted([*tmp_path.glob("*.png"), *tmp_path.glob("*.npy")])[0]
    content = file.read_bytes()
    if kind is ImageFolder:
        Image.fromarray(images[0] ^ np.uint8(1)).save(file)
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="was altered"):
        list(open_images(tmp_path).batches(2))
    with kind(tmp_path, made) as folder, pytest.raises(InputError, match="was altered"):
        folder.missing([0, 1])
    file.unlink()
    with kind(tmp_path, made) as folder:
        wanted = folder.missing([0, 1])
        folder.save([0, 1], samples)
    assert wanted and file.read_bytes() == content
    lines = (tmp_path / "manifest.sha256").read_text().splitlines()
    digest = hashlib.sha256(content).hexdigest()
    assert f"{digest}  {file.name}" in lines  # what `sha256sum -c` reads
    (tmp_path / "manifest.sha256").write_text("\n".join(line for line in lines if file.name not in line) + "\n" + lines[0][:30])
    with pytest.raises(InputError, match="is not in manifest"):
        list(open_images(tmp_path).batches(2))
    with kind(tmp_path, made) as folder:
        assert folder.missing([0, 1])
        folder.save([0, 1], samples)
    np.testing.assert_array_equal(np.concatenate(list(open_images(tmp_path).batches(2))), images)


def test_an_edited_manifest_is_refused(tmp_path):
    with ImageFolder(tmp_path, {"seed": 0, "eta": 0, "batch_size": 2}) as folder:
        folder.save([0], np.zeros((1, 3, 8, 8), np.float32))
    file = tmp_path / "manifest.json"
    about = json.loads(file.read_text())
    for edit in ({"seed": 1}, {"backend": "torch"}, {"content_sha256": None}):
        file.write_text(json.dumps({k: v for k, v in (about | edit).items() if v is not None}))
        with pytest.raises(InputError, match=r"altered|carries no digest"):
            open_images(tmp_path)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    folder = ShardFolder(tmp_path / "x", {})

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(InputError, match="the disk is full"):
        folder.save([0], np.zeros((1, 3, 8, 8), np.float32))
