import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, tiny_config
from PIL import Image

from modiff_trt.core.config import TrainingConfig
from modiff_trt.core.errors import InputError
from modiff_trt.runtime.images.sets import load_images
from modiff_trt.tools.demo import CANDIDATES, run
from modiff_trt.tools.research.train import train


@pytest.mark.slow
def test_demo_shows_the_method(tmp_path):
    run(tmp_path, 2, 0)
    figures = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == [c.name for c in CANDIDATES]
    # 15 steps of the better solver are nearer to 1000 steps than 50 of DDIM, also in INT8.
    truth = {name: row["psnr_to_1000_steps_db"] for name, row in rows.items()}
    assert min(truth["FP32, 2M"], truth["MoDiff W8A8, 2M"]) > truth["FP32"] + 8
    assert rows["MoDiff W8A8, 2M"]["psnr_db"] > 35 and rows["FP32, 2M"]["steps"] == 15
    assert rows["MoDiff W8A6"]["psnr_db"] > rows["Q-Diff W8A6"]["psnr_db"] + 3
    assert rows["MoDiff W8A6"]["state_bytes_per_image"] > 0 == rows["Q-Diff W8A6"]["state_bytes_per_image"]
    width, height = Image.open(tmp_path / "demo.png").size
    assert width > 300 and height > 300


def test_training_runs_and_writes_a_loadable_checkpoint(tmp_path):
    from modiff_trt.networks.checkpoint import load_checkpoint
    from modiff_trt.networks.unet2d import trace

    config = replace(tiny_config(), training=TrainingConfig(batch_size=4))
    images = np.random.default_rng(0).integers(0, 255, (16, 12, 12, 3), dtype=np.uint8)
    train(config, images, tmp_path / "m.safetensors", minutes=0.01, seed=0)
    assert load_checkpoint(tmp_path / "m.safetensors", trace(config)).params
    assert not list(tmp_path.glob("*.pt"))


def test_images_are_read_from_folders_archives_and_npz(tmp_path):
    import io
    import tarfile

    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.savez(tmp_path / "a.npz", arr_0=images)
    records = b"".join(bytes([7]) + image.transpose(2, 0, 1).tobytes() for image in images)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = len(records)
        archive.addfile(info, io.BytesIO(records))
    for path in (folder, tmp_path / "a.npz", tmp_path / "cifar-10-binary.tar.gz"):
        np.testing.assert_array_equal(load_images(path, 32), images)
    with pytest.raises(InputError, match="the model needs"):
        load_images(folder, 64)
    with pytest.raises(InputError, match="not found"):
        load_images(ROOT / "none", 32)
