"""`quantize`: one command to a folder, which goes on where it was stopped and refuses to mix two quantizations."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import alone, run
from conftest import ddim_state, random_checkpoint, tiny_config, tiny_tree
from safetensors.torch import save_file

from modiff_trt.core.files import read_signed, write_signed
from modiff_trt.core.scales import load_scales
from modiff_trt.runtime.backends.plan import load_plan
from modiff_trt.tools.cli import quantize as command


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(size=8, ch_mult=(1,), attn=())
    (folder / "tiny.yml").write_text(json.dumps(tiny_tree(size=8, ch_mult=(1,), attn=())))
    save_file(ddim_state(random_checkpoint(config).params, 1), folder / "tiny.safetensors")
    model = ["--config", folder / "tiny.yml", "--ckpt", folder / "tiny.safetensors"]
    return ["quantize", *model, "--timesteps", 3, "--num-samples", 2, "--preset", "fast", "--min-intensity", 0]


def test_one_command_makes_a_folder_and_keeps_what_is_there(job, tmp_path, capsys):
    out = tmp_path / "q"
    assert run(*job, "--out", out) == 0
    said = capsys.readouterr().out
    titles = [line.split(":")[0] for line in said.splitlines() if line.startswith("[")]
    assert re.search(r"^\[2/5\] calibrate: about \d+ s$", said, re.MULTILINE)
    assert titles == ["[1/5] collect", "[2/5] calibrate", "[3/5] export", "[4/5] report", "[5/5] README"]
    held = float(re.search(r"at most ([\d.]+) GB of memory", said)[1])
    now = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    assert 0.5 * now < held < 20 * now
    scales = load_scales(out / "scales.safetensors")
    assert scales.modulated and len(scales.rows.timesteps) == 3
    assert (
        run("sample", "--backend", "onnx", "--onnx", out / "network.onnx", "--num-samples", 1, "--out", tmp_path / "s.npz") == 0
    )
    with np.load(tmp_path / "s.npz") as images:
        assert np.isfinite(images["samples"]).all()
    assert "MoDiff" in (out / "report.html").read_text()
    card = (out / "README.md").read_text()
    assert card.startswith("# tiny, MoDiff W8A8\n")
    verdict = re.search(r"PSNR of 2 trial images to FP32: [\d.]+ dB", said)
    assert verdict and verdict[0] in card and "3 ddim" in card.replace("--timesteps 3", "3 ddim")
    digest = hashlib.sha256((out / "network.onnx").read_bytes()).hexdigest()
    assert digest[:16] in card and f"sample --backend onnx --onnx {out / 'network.onnx'}" in card
    # Its Python is what runs.
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"."', repr(str(out)))
    names = {}
    exec(code, names)
    assert len(names["images"]) == 4

    before = {file.name: file.read_bytes() for file in out.iterdir()}
    capsys.readouterr()
    assert run(*job, "--out", out) == 0
    assert capsys.readouterr().out.count("is there already") == 5
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before

    # What was made of a file that is gone is made again too.
    (out / "scales.safetensors").unlink()
    assert run(*job, "--out", out) == 0
    assert capsys.readouterr().out.count("is there already") == 1
    assert (out / "scales.safetensors").read_bytes() == before["scales.safetensors"]

    assert run(*job, "--act-bit", 6, "--timesteps", 4, "--out", out) == 2
    assert "holds a quantization with another timesteps, act_bit" in capsys.readouterr().err
    (out / "quantization.json").write_text("{}")
    assert run(*job, "--out", out) == 2


def test_it_goes_on_after_an_interruption(job, tmp_path, capsys, monkeypatch):
    out = tmp_path / "q"
    from modiff_trt.tools.cli import export

    def interrupted(**options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "export", interrupted)
        assert run(*job, "--out", out) == 130
    assert not (out / command.NETWORK).exists()
    capsys.readouterr()
    assert run(*job, "--out", out) == 0
    assert capsys.readouterr().out.count("is there already") == 2


def test_a_folder_that_cannot_be_written_is_said_at_once(job, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(*job, "--out", tmp_path / "file" / "q") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_diffusers_folder_stands_for_configuration_checkpoint_and_solver(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    settings = {"sample_size": 8, "block_out_channels": (32, 32), "down_block_types": down, "up_block_types": up}
    settings |= {
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }
    model = diffusers.UNet2DModel(**settings, layers_per_block=1)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "m")
    job = [
        "quantize",
        "--model",
        tmp_path / "m",
        "--timesteps",
        5,
        "--num-samples",
        2,
        "--preset",
        "fast",
        "--min-intensity",
        0,
    ]
    assert run(*job, "--out", tmp_path / "q") == 0
    solver = load_scales(tmp_path / "q" / "scales.safetensors").solver
    assert (solver.kind, solver.spacing, solver.clip_sample) == ("ddim", "leading", 1.0)
    few = ("--num-samples", 1, "--out")
    onnx, plain = tmp_path / "q" / "network.onnx", tmp_path / "float.onnx"
    assert run("sample", "--backend", "onnx", "--onnx", onnx, *few, tmp_path / "q.npz") == 0
    # In float the exported file and the folder give the same images; its scheduler must be said, as a float file carries none.
    assert run("export", "--model", tmp_path / "m", "--out", plain) == 0
    assert run("sample", "--model", tmp_path / "m", "--timesteps", 5, *few, tmp_path / "torch.npz") == 0
    settings = ("--timesteps", 5, "--spacing", "leading", "--clip-sample", 1)
    assert run("sample", "--backend", "onnx", "--onnx", plain, *settings, *few, tmp_path / "onnx.npz") == 0
    with np.load(tmp_path / "torch.npz") as exact, np.load(tmp_path / "onnx.npz") as exported:
        np.testing.assert_allclose(exact["samples"], exported["samples"], atol=1e-3)
    assert run("sample", "--model", tmp_path / "m", "--config", "x.yml", *few, tmp_path / "x.npz") == 2
    assert "leave these out" in capsys.readouterr().err
    assert run("sample", "--backend", "onnx", "--onnx", onnx, "--model", tmp_path / "m", *few, tmp_path / "x.npz") == 2
    # Another spacing has no use for what belongs to the folder's own.
    assert run("sample", "--model", tmp_path / "m", "--timesteps", 5, "--spacing", "quad", *few, tmp_path / "quad.npz") == 0


REFUSED = {
    "bits": (["--act-bit", 9], "--act-bit must lie between 2 and 8"),
    "nothing to quantize": (["--min-intensity", 1e6], "nothing would be quantized"),
    "one step": (["--timesteps", 1], "nothing to modulate"),
    "no steps": (["--timesteps", 0], "--timesteps must lie between"),
    "no images": (["--num-samples", 0], "must be at least 1"),
    "costs of nothing": (["--costs", "x.json"], "--costs is for --modes auto"),
    "no costs": (["--modes", "auto", "--costs", "x.json"], "does not exist"),
    "a solver's setting": (["--steps-offset", 1], "--steps-offset is for --spacing leading"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(job, tmp_path, capsys, name):
    options, why = REFUSED[name]
    assert run(*job, *options, "--out", tmp_path / "q") == 2
    captured = capsys.readouterr()
    assert why in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "q").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(job, tmp_path, capsys):
    out = tmp_path / "d"
    assert run(*job, "--out", out, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not out.exists() and "nothing was written" in said
    written = re.findall(r"would write (\S+?)(?:: about .*)?$", said, re.MULTILINE)
    assert run(*job, "--out", out) == 0
    assert {file.name for file in out.iterdir()} - {"quantization.json"} <= {name.rsplit("/", 1)[1] for name in written}
    (out / "report.html").unlink()
    capsys.readouterr()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert run(*job, "--out", out, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("is there already") == 4 and f"would write {out / 'report.html'}" in said
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_plan_is_built_and_the_readme_names_it(job, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    out = tmp_path / "e"
    assert run(*job, "--out", out) == 0
    done = alone(*job, "--out", out, "--engine", "rtx:sm89")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is there already") == 4  # the engine does not make scales again, but README is another
    (plan,) = out.glob("*.plan")
    card = (out / "README.md").read_text()
    assert f"--backend trt --plan {plan}" in card and "quantized ones in INT8" in card and "network-fp16.onnx" in card
    assert load_plan(plan).manifest["plugin"] and load_plan(plan).manifest["target"] == "sm89"


@pytest.mark.parametrize(("engine", "said"), [("rtx:sm1", "--target must be one of"), ("x", "must be one of auto")])
def test_an_engine_that_cannot_be_built_is_refused_before_the_first_stage(job, tmp_path, capsys, engine, said):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    assert run(*job, "--out", tmp_path / "f", "--engine", engine) == 2
    error = capsys.readouterr().err
    assert f"--engine {engine}: " in error and said in error
    assert not (tmp_path / "f").exists()


def test_its_folder_is_sampled_and_packed_as_a_model(job, tmp_path, capsys):
    out, few = tmp_path / "q", ["--num-samples", 2, "--out"]
    assert run(*job, "--out", out) == 0
    assert run("sample", "--model", out, *few, tmp_path / "a.npz") == 0
    assert run("sample", "--backend", "onnx", "--onnx", out / "network.onnx", *few, tmp_path / "b.npz") == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_array_equal(a["samples"], b["samples"])
    assert run("package", "--onnx", out, "--out", tmp_path / "s") == 0
    assert (tmp_path / "s/network.onnx").read_bytes() == (out / "network.onnx").read_bytes()
    capsys.readouterr()
    assert run("sample", "--model", out, "--backend", "native", *few, tmp_path / "c.npz") == 2
    assert run("sample", "--model", out, "--onnx", out / "network.onnx", *few, tmp_path / "c.npz") == 2
    said = capsys.readouterr().err
    assert "is a folder of `quantize`" in said and "leave --onnx out" in said and not (tmp_path / "c.npz").exists()


def test_a_report_of_the_folder_needs_nothing_else(job, tmp_path, capsys):
    out, moved = tmp_path / "q", tmp_path / "moved.safetensors"
    copied = [shutil.copy(word, moved) if str(word).endswith("tiny.safetensors") else word for word in job]
    assert run(*copied, "--out", out) == 0
    assert run("report", "--model", out, "--num-samples", 1, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert load_scales(out / "scales.safetensors").file_sha256 in page
    again = ["report", "--model", out, "--out", tmp_path / "again.html"]
    for words, why in (
        (["--scales", out / "scales.safetensors"], "leave out --scales"),
        (["--guidance", 2], "leave out --scales"),
    ):
        capsys.readouterr()
        assert run(*again, *words) == 2 and why in capsys.readouterr().err

    moved.unlink()
    assert run(*again) == 2
    assert f"{moved}, of which {out} was made, is gone" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "again.html").exists()
    assert run(*job, "--out", out) == 0  # the same weights where they lie now
    assert run(*again, "--num-samples", 1) == 0


def test_a_folder_of_an_earlier_version_says_how_to_go_on(job, tmp_path, capsys):
    out = tmp_path / "q"
    assert run(*job, "--out", out) == 0
    record = read_signed(out / "quantization.json", "record", "")
    del record["inputs"]
    write_signed(out / "quantization.json", record)
    capsys.readouterr()
    assert run("report", "--model", out, "--out", tmp_path / "page.html") == 2
    assert "run the same `quantize` again" in capsys.readouterr().err.replace("\n", " ")
    assert run(*job, "--out", out) == 0
    assert run("report", "--model", out, "--num-samples", 1, "--out", tmp_path / "page.html") == 0
