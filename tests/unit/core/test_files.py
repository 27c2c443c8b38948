import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import atomic_path, check_writable, load_arrays, read_json, save_arrays, write_json

HEADER = {"kind": "scales", "schema": 1, "note": "x"}


def test_round_trip(tmp_path):
    file = tmp_path / "a" / "b.safetensors"
    save_arrays(file, HEADER, {"v": np.arange(6, dtype=np.float32).reshape(2, 3).T})
    header, arrays, _ = load_arrays(file, "scales", 1)
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


def test_altered_headers_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_arrays(file, {**HEADER, "bits": 8, "pairs": {1: (2, 3), 10: ()}}, {"v": np.ones(3, np.float32)})
    assert load_arrays(file, "scales", 1)[0]["bits"] == 8
    content = file.read_bytes()
    file.write_bytes(content.replace(b'bits\\": 8', b'bits\\": 4'))
    assert file.read_bytes() != content
    with pytest.raises(InputError, match="was altered"):
        load_arrays(file, "scales", 1)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(InputError, match="is not a file"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_writers_of_one_folder_wait_for_each_other(tmp_path):
    code = f"""
from pathlib import Path
from modiff_trt.core.files import locked, read_json, write_json
path = Path({str(tmp_path / "n.json")!r})
for _ in range(100):
    with locked(path.parent):
        write_json(path, read_json(path, "count") + 1)
"""
    write_json(tmp_path / "n.json", 0)
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert read_json(tmp_path / "n.json", "count") == 200


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
