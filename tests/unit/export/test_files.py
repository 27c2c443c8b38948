import errno
import os

import numpy as np
import pytest

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import atomic_path, load_arrays, save_arrays, write_json

HEADER = {"kind": "scales", "schema": 1, "note": "x"}


def test_round_trip(tmp_path):
    file = tmp_path / "a" / "b.safetensors"
    save_arrays(file, HEADER, {"v": np.arange(6, dtype=np.float32).reshape(2, 3).T})
    header, arrays = load_arrays(file, "scales", 1)
    assert header == HEADER
    np.testing.assert_array_equal(arrays["v"], np.arange(6).reshape(2, 3).T)


def test_failure_leaves_nothing_behind(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"old": 1})
    with pytest.raises(KeyError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert file.read_text().strip().startswith("{") and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_full_disk_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="disk is full"), atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_truly_full_device(tmp_path):
    with pytest.raises(InputError, match="disk is full"), atomic_path(tmp_path / "x"), open("/dev/full", "wb") as full:
        full.write(b"x" * 100_000)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_altered_arrays_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_arrays(file, HEADER, {"v": np.ones(100, np.float32)})
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        load_arrays(file, "scales", 1)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    file = tmp_path / "x.safetensors"
    save_arrays(file, HEADER, {"v": np.ones(100, np.float32)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated"):
        load_arrays(file, "scales", 1)


def test_other_kind_and_other_schema(tmp_path):
    file = tmp_path / "x.safetensors"
    save_arrays(file, HEADER, {"v": np.ones(1, np.float32)})
    with pytest.raises(InputError, match="is a scales file, but a trajectories file"):
        load_arrays(file, "trajectories", 1)
    with pytest.raises(InputError, match="schema version 1"):
        load_arrays(file, "scales", 2)
    with pytest.raises(InputError, match="does not exist"):
        load_arrays(tmp_path / "none", "scales", 1)
