"""Files whose weights lie beside them: the same images, and one line where the two do not belong together."""

import shutil

import numpy as np
import pytest

from modiff_trt.core.errors import InputError
from modiff_trt.core.onnx_file import read_onnx
from modiff_trt.engines.onnx_network import load_network
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """(one file, the same network with its weights beside)."""
    folder = tmp_path_factory.mktemp("files")
    one, two = folder / "one.onnx", folder / "two.onnx"
    built = [build_onnx(tiny.network, tiny.checkpoint, tiny.scales(), "fp32", "0" * 64) for _ in range(2)]
    sizes = save_onnx(one, built[0]), save_onnx(two, built[1], outside=True)
    data = folder / "two.onnx.data"
    assert sizes == (one.stat().st_size, two.stat().st_size + data.stat().st_size)
    assert two.stat().st_size < one.stat().st_size / 4 < data.stat().st_size
    return one, two


def test_images_are_the_same(files, tiny):
    one, two = (tiny.sample(OnnxDenoiser(load_onnx(file)), images=2) for file in files)
    np.testing.assert_array_equal(one, two)
    alone, beside = (read_onnx(file) for file in files)
    assert alone.manifest["content_sha256"] == beside.manifest["content_sha256"] and alone.weights is None
    assert [t.raw_data for t in alone.proto.graph.initializer] == [t.raw_data for t in beside.proto.graph.initializer]


def test_both_files_belong_together(files, tmp_path):
    _, two = files
    data = two.with_name("two.onnx.data")
    shutil.copy(two, tmp_path / "two.onnx")
    with pytest.raises(InputError, match=r"keeps its weights in two\.onnx\.data, which is not beside it"):
        read_onnx(tmp_path / "two.onnx")
    altered = bytearray(data.read_bytes())
    altered[len(altered) // 2] ^= 1
    (tmp_path / data.name).write_bytes(altered)
    with pytest.raises(InputError, match="was altered"):
        load_onnx(tmp_path / "two.onnx")
    (tmp_path / data.name).write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="does not fit its weights"):
        load_onnx(tmp_path / "two.onnx")
    # Nothing outside the folder is read.
    proto = two.read_bytes().replace(b"two.onnx.data", b"../wo.on.data")
    (tmp_path / "two.onnx").write_bytes(proto)
    with pytest.raises(InputError, match="in other places"):
        read_onnx(tmp_path / "two.onnx")


def test_what_needs_one_file_says_so(files):
    with pytest.raises(InputError, match="below 2 GiB"):
        load_network(files[1])
