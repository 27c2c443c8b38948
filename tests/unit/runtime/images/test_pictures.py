"""What a set of pictures is: pytorch-fid's own reading of the same folder, and what is said of files that it leaves out."""

import os

import numpy as np
import pytest
from PIL import Image

from modiff_trt.core.errors import InputError
from modiff_trt.runtime.images.pictures import natural_key
from modiff_trt.runtime.images.sets import open_images


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


def pixels(folder):
    found = open_images(folder)
    return np.concatenate(list(found.batches(5))), found.notes


def test_formats_and_order_are_those_of_pytorch_fid(tmp_path, images):
    fid = pytest.importorskip("pytorch_fid.fid_score")
    suffixes = ["png", "bmp", "webp", "tiff", "tif", "ppm", "pgm", "jpg", "jpeg"]
    for i, suffix in enumerate(suffixes):
        picture = Image.fromarray(images[i]).convert("L" if suffix == "pgm" else "RGB")
        picture.save(tmp_path / f"{i}.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    theirs = sorted(file for ext in fid.IMAGE_EXTENSIONS for file in tmp_path.glob(f"*.{ext}"))
    expected = [np.asarray(Image.open(file).convert("RGB")) for file in theirs]
    found, notes = pixels(tmp_path)
    np.testing.assert_array_equal(found, expected)
    assert notes == () and len(found) == 9
    Image.fromarray(images[9]).save(tmp_path / "9.PNG")  # which pytorch-fid passes over
    assert len(pixels(tmp_path)[0]) == 10


def test_what_is_left_out_is_counted(tmp_path, images):
    for i, image in enumerate(images[:4]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for folder in ("grids", ".ipynb_checkpoints", "class_3"):
        (tmp_path / folder).mkdir()
        Image.fromarray(images[5]).save(tmp_path / folder / "0.png")
    Image.fromarray(images[5]).save(tmp_path / "movie.gif")
    (tmp_path / "notes.txt").touch()
    os.mkfifo(tmp_path / "9.png")  # nobody writes to it
    found, notes = pixels(tmp_path)
    assert len(found) == 4
    assert "3 pictures in subfolders" in notes[0] and "1 .gif" in notes[1]


def test_classes_in_subfolders_are_read_without_what_tools_put_there(tmp_path, images):
    for i, folder in enumerate(("class_10", "class_2", ".hidden", "grids")):
        (tmp_path / folder).mkdir()
        Image.fromarray(images[i]).save(tmp_path / folder / "0.png")
    found, notes = pixels(tmp_path)
    np.testing.assert_array_equal(found, images[[1, 0]])  # class_2 comes before class_10
    assert "2 pictures in hidden folders" in notes[0]


def test_alpha_and_depth_are_not_lost_without_a_word(tmp_path, images):
    pytest.importorskip("pytorch_fid")
    rgba = np.concatenate([images[0], images[1][:, :, :1]], axis=2)
    Image.fromarray(rgba).save(tmp_path / "0.png")
    Image.fromarray(images[1]).save(tmp_path / "1.png")
    found, notes = pixels(tmp_path)
    np.testing.assert_array_equal(found[0], images[0])
    assert "1 of 2 pictures" in notes[0] and "alpha" in notes[0]
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(tmp_path / "2.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        open_images(tmp_path)


def test_channels_that_are_no_picture_are_named(tmp_path, images):
    for channels in (2, 4, 5):
        array = np.resize(images, (3, 16, 16, channels))
        np.savez(tmp_path / "x.npz", arr_0=array)
        with pytest.raises(InputError, match=rf"arr_0 is uint8 \(3, 16, 16, {channels}\)"):
            open_images(tmp_path / "x.npz")
        folder = tmp_path / str(channels)
        folder.mkdir()
        np.save(folder / "images-000000-000002.npy", array)
        with pytest.raises(InputError, match=f"{channels} channels"):
            open_images(folder)


def test_names_sort_by_their_numbers():
    names = ["a10", "a9", "a", "10", "9", "a9b2", "a9b10", "01", "1"]
    ordered = sorted(names, key=natural_key)
    assert ordered.index("a9") < ordered.index("a10") and ordered.index("9") < ordered.index("10")
    assert ordered.index("a9b2") < ordered.index("a9b10")
    assert len({natural_key(name) for name in names}) == len(names)


def test_a_name_that_is_no_text(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "0.png")
    os.rename(tmp_path / "0.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    found = open_images(tmp_path)
    assert found.count == 1 and found.content_sha256() and found.fingerprint()
