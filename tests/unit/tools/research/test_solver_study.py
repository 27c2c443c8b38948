import json

import numpy as np
import pytest
import typer
import yaml
from conftest import ddim_state, random_checkpoint, tiny_config, tiny_tree
from safetensors.torch import save_file

from modiff_trt.tools.research import solver_figure, solver_study


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Statistics of these few images are of no use to whoever runs the tests."""
    monkeypatch.setenv("MODIFF_TRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Configuration and checkpoint of a network for 32 x 32 images, which FD-CIFAR needs, and some images."""
    folder, config = tmp_path_factory.mktemp("model"), tiny_config(32, (1,), ())
    (folder / "tiny.yml").write_text(yaml.safe_dump(tiny_tree(32, (1,), ())))
    save_file(ddim_state(random_checkpoint(config).params, 1), folder / "tiny.safetensors")
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    return folder


def run(model, out, parts, **changed):
    options = {
        "passes": "3,33",
        "few": "3",
        "bits": "8",
        "images": 2,
        "fd_images": 3,
        "whole_images": 3,
        "truth_steps": 5,
        "batch_size": 2,
        "device": "cpu",
        "seconds": 1e9,
    }
    solver_study.main(
        config=model / "tiny.yml",
        ckpt=model / "tiny.safetensors",
        reference=model / "images.npz",
        out=out,
        parts=parts,
        **(options | changed),
    )
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_part_writes_its_figures(model, tmp_path, monkeypatch):
    # No layer of this network does 200 multiply-accumulates an element.
    monkeypatch.setattr(solver_study, "INTENSITY", 0.0)
    monkeypatch.setattr(solver_study, "ROW_TRIALS", 2)
    figures = run(model, tmp_path / "study.json", "nearness,bits,native")
    assert "twice" in figures["nearness"]["dpmpp-2m quad 33"]["refused"]
    assert figures["nearness"]["dpmpp-2m logsnr 33"]["passes"] <= 33
    assert figures["bits"]["3 passes, MoDiff, a grid a sample A8"] > 10
    assert figures["native"]["3 passes"]["native_to_simulation_db"] > 20
    figures = run(model, tmp_path / "study.json", "quality,whole", passes="3")
    assert {key.rpartition(" ")[2] for key in figures["quality"]} == {"3"} and len(figures["quality"]) == 4
    assert figures["whole"]["native MoDiff W8A8, ddim quad 100"]["images"] == 3
    assert "nearness" in figures
    solver_figure.main(tmp_path / "study.json")
    assert (tmp_path / "solvers.png").stat().st_size > 10_000


def test_other_settings_are_refused(model, tmp_path, capsys):
    out = tmp_path / "study.json"
    out.write_text(json.dumps({"fd_images": 5}))
    for part, line in (("nearness", "figures of another fd_images"), ("none", "unknown part 'none'")):
        with pytest.raises(typer.Exit):
            run(model, out, part)
        assert line in capsys.readouterr().err
