"""Image sets of every kind give the same images in the same order, and damaged ones are refused."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import write_signed
from modiff_trt.runtime.images.folders import ShardFolder, save_npz
from modiff_trt.runtime.images.sets import cifar_batches, open_images

COUNT = 11


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


def samples(images):
    return (images.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)


def archive(path, images, prefix="data_batch_1"):
    records = b"".join(bytes([i % 10]) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images))
    with tarfile.open(path, "w:gz") as file:
        info = tarfile.TarInfo(f"cifar-10-batches-bin/{prefix}.bin")
        info.size = len(records)
        file.addfile(info, io.BytesIO(records))
    return path


@pytest.fixture(params=["png", "ours", "guided-diffusion", "compressed", "archive", "shards"])
def kind(request, images, tmp_path):
    if request.param == "png":
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
        return tmp_path
    if request.param == "archive":
        return archive(tmp_path / "cifar-10-binary.tar.gz", images)
    if request.param == "shards":
        folder = ShardFolder(tmp_path / "s", {"a": 1})
        for begin in range(0, COUNT, 4):
            indices = list(range(begin, min(begin + 4, COUNT)))
            folder.save(indices, samples(images[indices]))
        return tmp_path / "s"
    save = np.savez_compressed if request.param == "compressed" else np.savez
    save(tmp_path / "a.npz", **{"images" if request.param == "ours" else "arr_0": images})
    return tmp_path / "a.npz"


@pytest.mark.parametrize("size", [1, 3, 11, 600])
def test_every_kind_gives_the_images_in_batches(kind, images, size):
    found = open_images(kind)
    assert (found.count, found.shape) == (COUNT, (32, 32))
    batches = list(found.batches(size))
    assert {len(batch) for batch in batches[:-1]} <= {size}
    np.testing.assert_array_equal(np.concatenate(batches), images)
    assert found.fingerprint() == open_images(kind).fingerprint()


def test_shards_grow_with_the_set_and_gaps_are_refused(images, tmp_path):
    folder = ShardFolder(tmp_path, {})
    folder.save([0, 1], samples(images[:2]))  # a run of two images, whose last batch is short
    assert folder.missing([0, 1]) == [] and folder.missing([0, 1, 2, 3]) == [0, 1, 2, 3]
    folder.save([0, 1, 2, 3], samples(images[:4]))
    assert folder.missing([0, 1, 2, 3]) == folder.missing([0, 1]) == [] and len(list(tmp_path.glob("*.npy"))) == 1
    assert ShardFolder(tmp_path, {}).missing([0, 1]) == []  # a smaller run again: nothing goes
    with pytest.raises(InputError, match="overlaps 2 to 5"):
        folder.missing([2, 3, 4, 5])
    folder.save([8, 9, 10], samples(images[8:]))
    with pytest.raises(InputError, match="images 4 to 7 are missing"):
        open_images(tmp_path)
    (tmp_path / "images-000004-000007.npy").write_bytes(b"half a file")
    with pytest.raises(InputError, match="delete it"):
        open_images(tmp_path)
    with pytest.raises(InputError, match="another run"):
        ShardFolder(tmp_path, {"batch_size": 5})


def test_pictures_are_sorted_by_their_number(images, tmp_path):
    for name, image in zip((9, 10, 11, 100), images[:4], strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(np.concatenate(list(open_images(tmp_path).batches(9))), images[:4])
    write_signed(tmp_path / "manifest.json", {})  # ours: a hole is an image that is missing
    with pytest.raises(InputError, match="are missing"):
        open_images(tmp_path)


def test_more_shards_than_files_may_be_open(images, tmp_path):
    import resource

    folder = ShardFolder(tmp_path, {})
    for i in range(COUNT):
        folder.save([i], samples(images[i : i + 1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    import os

    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 5, hard))
    try:
        assert sum(len(batch) for batch in open_images(tmp_path).batches(4)) == COUNT
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_damaged_sets_are_refused_in_one_line(images, tmp_path):
    np.savez(tmp_path / "whole.npz", images=images)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:9000])
    np.savez(tmp_path / "float.npz", images=images.astype(np.float32))
    np.savez(tmp_path / "fortran.npz", images=np.asfortranarray(images))
    whole = archive(tmp_path / "cifar.tar.gz", images)
    (tmp_path / "half.tar.gz").write_bytes(whole.read_bytes()[:9000])
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.fromarray(images[0]).save(mixed / "0.png")
    Image.fromarray(images[1][:16]).save(mixed / "1.png")
    for name in ("half.npz", "float.npz", "fortran.npz", "half.tar.gz", "mixed", "none", "none.txt"):
        with pytest.raises(InputError):
            list(open_images(tmp_path / name).batches(4))
    with pytest.raises(InputError, match="no test_batch"):
        list(cifar_batches(whole, "test_batch"))


def test_the_checksum_of_an_archive_is_compared(images, tmp_path):
    """It stands behind the end of the archive proper, where a reader of its members does not come."""
    whole = archive(tmp_path / "cifar.tar.gz", images)
    content = bytearray(whole.read_bytes())
    content[-6] ^= 1
    whole.write_bytes(content)
    with pytest.raises(gzip.BadGzipFile):
        gzip.decompress(content)
    with tarfile.open(whole) as file:
        assert file.getnames()  # which does not see it
    with pytest.raises(InputError, match="cannot be read"):
        open_images(whole)


@pytest.mark.parametrize("part", ["images", "indices"])
def test_an_archive_of_ours_that_was_packed_again_with_other_arrays_is_refused(images, tmp_path, part):
    save_npz(tmp_path / "a.npz", samples(images), range(COUNT), {"seed": 0, "eta": 0, "batch_size": 1})
    assert sum(len(batch) for batch in open_images(tmp_path / "a.npz").batches(4)) == COUNT
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    arrays[part] = arrays[part][::-1].copy()
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="were altered"):
        list(open_images(tmp_path / "a.npz").batches(4))
