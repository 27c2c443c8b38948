"""The command line, run as a user runs it, and what it says to bad input: one line, exit code 2, nothing left behind."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from command import run
from conftest import ROOT, ddim_state, random_checkpoint, tiny_config, tiny_tree
from PIL import Image
from safetensors.torch import save_file

from modiff_trt.core.files import load_arrays, read_signed, save_arrays, write_signed
from modiff_trt.core.scales import SCHEMA, load_scales
from modiff_trt.export.calibration.pipeline import TRIAL_SEED
from modiff_trt.export.calibration.trials import Trials
from modiff_trt.runtime.backends.registry.options import load_model

CONFIG, CKPT = str(ROOT / "configs/demo.yml"), str(ROOT / "calib_cache/demo/model.safetensors")
MODEL = ["--config", CONFIG, "--ckpt", CKPT]
CALIBRATE_AUTO = ["calibrate", *MODEL, "--trajectories", "TRAJ", "--modes", "auto", "--out", "OUT"]


def refusal(capsys, *arguments) -> str:
    capsys.readouterr()
    code = run(*arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """collect -> calibrate -> export on the demo model, through the command line."""
    folder = tmp_path_factory.mktemp("pipeline")
    paths = {name: folder / name for name in ("traj.safetensors", "scales.safetensors", "m.onnx", "float.onnx")}
    trajectories, scales, onnx, plain = paths.values()
    steps = ("--timesteps", 8, "--num_samples", 3, "--calib-steps", 8, "--batch-size", 2)
    assert run("collect", *MODEL, *steps, "--out", trajectories) == 0
    bits = ("--act_bit", 6, "--weight_bit", 8, "--min-intensity", 0, "--trial-images", 1, "--preset", "fast")
    assert run("calibrate", *MODEL, "--trajectories", trajectories, *bits, "--out", scales) == 0
    assert run("export", *MODEL, "--scales", scales, "--out", onnx) == 0
    assert run("export", *MODEL, "--out", plain) == 0
    return paths


def test_pipeline_writes_what_it_says(files):
    scales = load_scales(files["scales.safetensors"])
    assert scales.layers["mid_block.attentions.0.to_qkv"].act_bits == 6 and len(scales.rows) - scales.rows.warmup == 8
    assert not list(files["m.onnx"].parent.glob("*.part"))


def test_calibrate_leaves_layers_that_move_data_in_float_and_says_what_limits_it(files, tmp_path, capsys):
    job = [
        "calibrate",
        *MODEL,
        "--trajectories",
        files["traj.safetensors"],
        "--trial-images",
        1,
        "--preset",
        "fast",
        "--no-correct-bias",
    ]
    assert run(*job, "--out", tmp_path / "s") == 0
    scales, said = load_scales(tmp_path / "s"), capsys.readouterr().out
    assert {scales.layers[name].mode for name in ("conv_in", "mid_block.attentions.0.to_qkv", "conv_out")} == {"float"}
    assert "PSNR of 1 trial images to FP32" in said
    assert re.search(r"The weights limit it; what helps: --rounding adaround \(about \d+ (s|min)\)", said)
    assert re.search(r"without state \(Q-Diffusion\) \d+\.\d\.", said)
    assert run(*job, "--preset", "balanced", "--out", tmp_path / "b") == 0
    assert "search: none, since the weights limit the image" in capsys.readouterr().out
    assert (tmp_path / "b").read_bytes() == (tmp_path / "s").read_bytes()
    assert run(*job, "--method", "qdiff", "--act-bit", 4, "--out", tmp_path / "q") == 0
    assert "The activations limit it; what helps: --method modiff" in capsys.readouterr().out
    assert run(*job, "--act-bit", 3, "--out", tmp_path / "m") == 0
    assert re.search(r"what helps: --search rows \(about \d+ s\)", capsys.readouterr().out)
    assert run(*job, "--trial-images", 0, "--out", tmp_path / "n") == 0
    assert "PSNR" not in capsys.readouterr().out
    assert run(*job[:-1], "--out", tmp_path / "c") == 0
    said = capsys.readouterr().out
    assert (
        re.search(r"biases: with exact activations 40\.\d dB, corrected 5\d\.\d dB", said)
        and "The activations limit it" in said
    )


def test_backends_agree_from_given_noise(files, tmp_path):
    noise = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    np.save(tmp_path / "x.npy", noise)
    common = ["--noise", tmp_path / "x.npy", "--num-samples", 2]
    assert run("sample", "--backend", "torch", *MODEL, "--timesteps", 8, *common, "--out", tmp_path / "torch.npz") == 0
    sim = ["--backend", "torch-sim", *MODEL, "--scales", files["scales.safetensors"], "--out", tmp_path / "sim.npz"]
    assert run("sample", *sim, *common) == 0
    assert run("sample", "--backend", "onnx", "--onnx", files["m.onnx"], *common, "--out", tmp_path / "onnx.npz") == 0
    native = ["--backend", "native", *MODEL, "--scales", files["scales.safetensors"], "--out", tmp_path / "native.npz"]
    assert run("sample", *native, *common) == 0
    plain = ["--onnx", files["float.onnx"], "--timesteps", 8, "--skip-type", "quad"]
    assert run("sample", "--backend", "onnx", *plain, *common, "--out", tmp_path / "float.npz") == 0
    samples = {}
    for name in ("torch", "sim", "onnx", "native", "float"):
        with np.load(tmp_path / f"{name}.npz") as archive:
            samples[name] = archive["samples"]
            assert archive["samples"].dtype == np.float32 and archive["samples"].shape == (2, 3, 32, 32)
            assert archive["images"].dtype == np.uint8 and archive["images"].shape == (2, 32, 32, 3)
            assert json.loads(str(archive["manifest"]))["seed"] == 0
    np.testing.assert_allclose(samples["float"], samples["torch"], atol=1e-4)
    # Eight steps at 6 bits: a rounding on an edge that falls the other way is seen in the image.
    assert np.abs(samples["onnx"] - samples["sim"]).mean() < 0.06
    assert np.abs(samples["native"] - samples["sim"]).mean() < 0.06
    assert 0 < np.abs(samples["sim"] - samples["torch"]).mean() < 0.3


def test_png_folder_resumes_and_keeps_what_is_there(files, tmp_path, capsys):
    out = tmp_path / "images"
    job = ["sample", "--backend", "onnx", "--onnx", files["m.onnx"], "--seed", 3, "--output_dir", out]
    assert run(*job, "--num_samples", 2) == 0
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob("*.png")}
    (out / "00001.png").unlink()
    assert run(*job, "--num_samples", 4) == 0
    assert "(1 were there already)" in capsys.readouterr().out
    assert sorted(f.name for f in out.glob("*.png")) == [f"{i:05d}.png" for i in range(4)]
    assert (out / "00000.png").stat().st_mtime_ns == before["00000.png"][1]
    again = np.asarray(Image.open(out / "00001.png")).astype(int)
    assert again.shape == (32, 32, 3)
    for other in (("--seed", 4), ("--batch-size", 3)):
        assert "another run" in refusal(capsys, *job[:-2], *other, "--out", out)


def test_bench_times_every_backend_at_every_size(files, tmp_path):
    out = tmp_path / "bench.json"
    few = ("--num-runs", 1, "--num-passes", 1, "--num-warmup", 1, "--batch-sizes", "1,2")
    backends = "torch-fp32,torch-sim,native-int8,native-modiff"
    job = (*MODEL, "--scales", files["scales.safetensors"], "--backends", backends, "--out", out)
    assert run("bench", *job, *few) == 0
    result = json.loads(out.read_text())
    assert list(result["batches"]) == ["1", "2"]
    for rows in result["batches"].values():
        assert list(rows) == backends.split(",") and all(row["microseconds"] > 0 for row in rows.values())
        assert rows["native-int8"]["state_bytes_an_image"] == 0 < rows["native-modiff"]["state_bytes_an_image"]


def test_costs_decide_modes_and_the_choice_has_a_row_of_its_own(tmp_path, capsys):
    config = tiny_config(size=16, ch_mult=(1,), attn=())
    (tmp_path / "tiny.yml").write_text(json.dumps(tiny_tree(size=16, ch_mult=(1,), attn=())))
    save_file(ddim_state(random_checkpoint(config).params, 1), tmp_path / "tiny.safetensors")
    model = ["--config", tmp_path / "tiny.yml", "--ckpt", tmp_path / "tiny.safetensors"]
    scales, auto, costs = (tmp_path / name for name in ("scales", "auto", "costs.json"))
    collected = tmp_path / "traj"
    assert run("collect", *model, "--timesteps", 4, "--num-samples", 2, "--calib-steps", 4, "--out", collected) == 0
    job = ["calibrate", *model, "--trajectories", collected, "--trial-images", 1, "--min-intensity", 0, "--preset", "fast"]
    assert run(*job, "--out", scales) == 0
    capsys.readouterr()
    assert run(*job[:-2], "--act-bit", 3, "--out", tmp_path / "rows") == 0
    assert "rows: kept" in capsys.readouterr().out
    few = ["--num-runs", 1, "--num-passes", 1, "--num-warmup", 1, "--batch-sizes", "1"]
    timed = ["bench", *model, "--scales", scales, *few, "--out", tmp_path / "bench.json"]
    assert run(*timed, "--costs", costs, "--backends", "native-modiff") == 0
    auto_job = [*job, "--modes", "auto", "--costs", costs, "--out", auto]
    assert "no network in floating point" in refusal(capsys, *auto_job, "--target-speed", 2)
    capsys.readouterr()
    assert run(*timed, "--costs", costs) == 0
    assert "costs at batch 1" in capsys.readouterr().out
    # One pass on a busy machine says nothing; what follows reads these numbers in place of those.
    steady = read_signed(costs, "costs of modes", "")
    times = steady["batches"]["1"]
    assert set(times["added"]) == set(times["base"]) and times["baseline"] > 0
    times["mixtures"] = [mixture | {"error": -0.5} for mixture in times["mixtures"]]
    times |= {"whole": 100.0, "added": {name: dict.fromkeys(found, -1.0) for name, found in times["added"].items()}}
    write_signed(costs, steady)
    # Modelled costs: that state saves time on this machine is not sure.
    assert run(*job, "--modes", "auto", "--max-loss", 100, "--out", auto) == 0
    said = capsys.readouterr().out
    assert "modelled" in said and "chosen" in said
    chosen = load_scales(auto)
    assert chosen.curve is not None
    advice = chosen.curve.advice()
    assert advice and advice in " ".join(said.split())
    # Judged on noise that no mode was chosen on.
    network, checkpoint = load_model(model[1], model[3])
    others = Trials(
        network, checkpoint, chosen.rows.timesteps, chosen.solver, images=1, seed=TRIAL_SEED + 1, device="cpu"
    ).decibels(chosen)
    assert f"PSNR of 1 other images to FP32: {others:.1f} dB" in " ".join(said.split())
    assert run(*job, "--modes", "auto", "--costs", costs, "--out", tmp_path / "measured") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "CPU cores at batch 1" in said and "errors of up to 50%; do not choose by them" in said
    assert "no mixture of modes" in refusal(
        capsys, *job, "--modes", "auto", "--costs", costs, "--target-speed", 1000, "--out", tmp_path / "x"
    )
    assert run(*timed, "--auto-scales", auto) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["batches"]["1"]
    assert rows["native-auto"]["state_bytes_an_image"] == 0 < rows["native-modiff"]["state_bytes_an_image"]


def test_no_modulate_is_plain_qdiff(files, tmp_path):
    base = ["sample", "--backend", "torch-sim", *MODEL, "--scales", files["scales.safetensors"], "--num-samples", 1]
    assert run(*base, "--out", tmp_path / "a.npz") == 0
    assert run(*base, "--no-modulate", "--out", tmp_path / "b.npz") == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.abs(a["samples"] - b["samples"]).max() > 1e-3
    assert run("export", *MODEL, "--scales", files["scales.safetensors"], "--no-modulate", "--out", tmp_path / "q.onnx") == 0
    assert (
        run("sample", "--backend", "onnx", "--onnx", tmp_path / "q.onnx", "--num-samples", 1, "--out", tmp_path / "q.npz") == 0
    )


def test_collect_goes_on_after_an_interruption(tmp_path, monkeypatch):
    from modiff_trt.export.calibration import collecting

    job = ["collect", *MODEL, "--timesteps", 3, "--num-samples", 3, "--batch-size", 1, "--out", tmp_path / "t.safetensors"]
    calls, real = [], collecting.sample_trajectory

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(collecting, "sample_trajectory", interrupted)
    assert run(*job) == 130
    assert not (tmp_path / "t.safetensors").exists()
    assert run(*job) == 0
    assert len(calls) == 4  # two images were kept
    assert run(*job[:-1], tmp_path / "whole.safetensors") == 0
    pieces, whole = (load_arrays(tmp_path / f"{n}.safetensors", "trajectories", 3)[1] for n in ("t", "whole"))
    np.testing.assert_array_equal(pieces["x"], whole["x"])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["t.safetensors", "whole.safetensors"]


REFUSED = {
    "no config": (["sample", "--backend", "torch", "--ckpt", CKPT, "--out", "OUT"], "--config is missing"),
    "no such config": (["sample", "--config", "none.yml", "--ckpt", CKPT, "--out", "OUT"], "none.yml does not exist"),
    "no such checkpoint": (["sample", "--config", CONFIG, "--ckpt", "none.pt", "--out", "OUT"], "none.pt does not exist"),
    "wrong checkpoint": (["sample", "--config", "CIFAR", "--ckpt", CKPT, "--out", "OUT"], "does not fit the configuration"),
    "unknown backend": (["sample", "--backend", "tpu", *MODEL, "--out", "OUT"], "--backend must be one of"),
    "sim without scales": (["sample", "--backend", "torch-sim", *MODEL, "--out", "OUT"], "needs --scales"),
    "torch with scales": (["sample", *MODEL, "--scales", "SCALES", "--out", "OUT"], "--scales does not go with"),
    "onnx without file": (["sample", "--backend", "onnx", "--out", "OUT"], "needs --onnx"),
    "not an onnx": (["sample", "--backend", "onnx", "--onnx", CKPT, "--out", "OUT"], "cannot be loaded"),
    "other steps": (
        ["sample", "--backend", "onnx", "--onnx", "ONNX", "--timesteps", "9", "--out", "OUT"],
        "calibrated for --solver ddim --timesteps 8 --spacing quad",
    ),
    "onnx unmodulated": (
        ["sample", "--backend", "onnx", "--onnx", "ONNX", "--no-modulate", "--out", "OUT"],
        "decided at export",
    ),
    "onnx of other config": (
        ["sample", "--backend", "onnx", "--onnx", "ONNX", "--config", "CIFAR", "--out", "OUT"],
        "another configuration",
    ),
    "zero images": (["sample", *MODEL, "--num-samples", "0", "--timesteps", "2", "--out", "OUT"], "between 1 and"),
    "too many images": (["sample", *MODEL, "--num-samples", "9" * 20, "--out", "OUT"], "between 1 and"),
    "images beyond all": (["sample", *MODEL, "--seeds", f"{10**22}-{10**22}", "--out", "OUT"], "must lie below"),
    "images said twice": (["sample", *MODEL, "--num-samples", "2", "--seeds", "2-3", "--out", "OUT"], "pass one of them"),
    "eta into a folder": (["sample", *MODEL, "--eta", "2", "--timesteps", "2", "--out", "FOLDER"], "--eta must lie between"),
    "eta of nothing": (["sample", *MODEL, "--eta", "nan", "--timesteps", "2", "--out", "OUT"], "--eta must lie between"),
    "no name": (["collect", *MODEL, "--out", "."], "is not a file"),
    "state of nothing": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--method", "qdiff", "--modes", "auto", "--out", "OUT"],
        "--modes auto takes state",
    ),
    "a loss without a choice": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--max-loss", "1", "--out", "OUT"],
        "are for --modes auto",
    ),
    "two goals": (
        [*CALIBRATE_AUTO, "--max-loss", "1", "--target-speed", "2"],
        "not both",
    ),
    "a speed without costs": ([*CALIBRATE_AUTO, "--target-speed", "2"], "need --costs"),
    "a negative loss": ([*CALIBRATE_AUTO, "--max-loss", "-1"], "must not be negative"),
    "costs of nothing": ([*CALIBRATE_AUTO, "--costs", "CIFAR"], "is not readable JSON"),
    "modulation of a float network": (
        ["sample", *MODEL, "--no-modulate", "--timesteps", "2", "--out", "OUT"],
        "--no-modulate is for quantized networks",
    ),
    "negative seed": (["sample", *MODEL, "--seed", "-1", "--timesteps", "2", "--out", "OUT"], "--seed must lie between"),
    "eta": (["sample", *MODEL, "--eta", "2", "--timesteps", "2", "--out", "OUT"], "--eta must lie between 0 and 1"),
    "timesteps": (["sample", *MODEL, "--timesteps", "0", "--out", "OUT"], "--timesteps must lie between 1 and 1000"),
    "skip type": (
        ["sample", *MODEL, "--skip-type", "cubic", "--out", "OUT"],
        "'--skip-type': 'cubic' is not one of 'quad', 'uniform', 'leading', 'trailing'",
    ),
    "noise missing": (["sample", *MODEL, "--noise", "none.npy", "--timesteps", "2", "--out", "OUT"], "none.npy does not exist"),
    "noise of wrong shape": (["sample", *MODEL, "--noise", "NOISE", "--timesteps", "2", "--out", "OUT"], "must be float32"),
    "no gpu": (["sample", *MODEL, "--device", "tpu", "--out", "OUT"], "--device must be cpu or cuda"),
    "trajectories missing": (["calibrate", *MODEL, "--trajectories", "none", "--out", "OUT"], "none does not exist"),
    "wrong kind of file": (["calibrate", *MODEL, "--trajectories", "SCALES", "--out", "OUT"], "is a scales file, but"),
    "bits": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--act-bit", "9", "--out", "OUT"],
        "--act-bit must lie between 2 and 8",
    ),
    "scales missing": (["export", *MODEL, "--scales", "none", "--out", "OUT"], "none does not exist"),
    "dtype": (["export", *MODEL, "--dtype", "int4", "--out", "OUT"], "--dtype must be one of"),
    "percentile": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--scale-method", "percentile", "--percentile", "2", "--out", "OUT"],
        "between 0.5 and 1",
    ),
    "percentile of nothing": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--percentile", "0.99", "--out", "OUT"],
        "--percentile is for --scale-method or --activation-method percentile",
    ),
    "residuals of what has none": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--method", "qdiff", "--scale-method", "mse", "--out", "OUT"],
        "pass --activation-method",
    ),
    "grids that are not found": (
        [
            "calibrate",
            *MODEL,
            "--trajectories",
            "TRAJ",
            "--granularity",
            "tensor",
            "--activation-method",
            "mse",
            "--out",
            "OUT",
        ],
        "--activation-method is for --granularity static",
    ),
    "everything in float": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--min-intensity", "1e6", "--out", "OUT"],
        "nothing would be quantized",
    ),
    "search": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--search", "all", "--out", "OUT"],
        "'--search': 'all' is not one of",
    ),
    "residuals": (
        ["calibrate", *MODEL, "--trajectories", "TRAJ", "--residuals", "both", "--out", "OUT"],
        "'--residuals': 'both' is not one of",
    ),
    "native without scales": (["sample", "--backend", "native", *MODEL, "--out", "OUT"], "--backend native needs --scales"),
    "fp16 on a cpu": (["sample", *MODEL, "--dtype", "fp16", "--out", "OUT"], "--device cuda"),
    "fp16 elsewhere": (
        ["sample", "--backend", "onnx", "--onnx", "ONNX", "--dtype", "fp16", "--out", "OUT"],
        "for --backend torch",
    ),
    "bench of what": (
        ["bench", *MODEL, "--scales", "SCALES", "--backends", "tpu", "--out", "OUT"],
        "--backends: unknown 'tpu'",
    ),
    "bench of no size": (
        ["bench", *MODEL, "--scales", "SCALES", "--batch-sizes", "a", "--out", "OUT"],
        "--batch-sizes must be",
    ),
    "seeds": (["sample", *MODEL, "--seeds", "9-3", "--out", "OUT"], "--seeds must be a range"),
    "shards in one file": (["sample", *MODEL, "--shards", "--out", "OUT.npz"], "pass a folder"),
    "evaluate against nothing": (["evaluate", "--samples", "none", "--out", "OUT"], "nothing to compare with"),
    "evaluate what": (["evaluate", "--samples", "none", "--reference", "none", "--out", "OUT"], "images none not found"),
    "report of half a model": (["report", "--config", "configs/demo.yml", "--out", "OUT"], "go together"),
    "report of another file": (["report", "--bench", "none.json", "--out", "OUT"], "none.json does not exist"),
    "build of what": (["build", "--onnx", "none.onnx", "--out", "OUT"], "none.onnx does not exist"),
    "build for whom": (["build", "--onnx", "ONNX", "--runtime", "onnx", "--out", "OUT"], "--runtime must be one of"),
    "package of what": (["package", "--onnx", "none.onnx", "--out", "OUT"], "none.onnx does not exist"),
    "unknown option": (["export", *MODEL, "--colour", "red", "--out", "OUT"], "--colour"),
    "missing option": (["export", *MODEL], "--out"),
    "not a number": (["sample", *MODEL, "--num-samples", "many", "--out", "OUT"], "--num-samples"),
    "unknown stage": (["quantise"], "quantise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(case, files, tmp_path, capsys, monkeypatch):
    arguments, message = REFUSED[case]
    np.save(tmp_path / "noise.npy", np.zeros((1, 3, 8, 8), np.float32))
    names = {
        "OUT": tmp_path / "out" / "o.npz",
        "FOLDER": tmp_path / "out" / "images",
        "CIFAR": ROOT / "configs/cifar10.yml",
        "SCALES": files["scales.safetensors"],
        "TRAJ": files["traj.safetensors"],
        "ONNX": files["m.onnx"],
        "NOISE": tmp_path / "noise.npy",
    }
    monkeypatch.chdir(tmp_path)
    text = refusal(capsys, *[names.get(a, a) for a in arguments])
    assert message in text
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["noise.npy"]


@pytest.mark.parametrize("name", ["traj.safetensors", "scales.safetensors", "m.onnx"])
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_files_are_refused(files, tmp_path, capsys, name, damage):
    broken = tmp_path / name
    content = bytearray(files[name].read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif name == "m.onnx":
        content[len(content) // 2] ^= 0xFF  # somewhere among the constants
    else:
        content[-9] ^= 0xFF
    broken.write_bytes(content)
    out = tmp_path / "o"
    command = {
        "traj.safetensors": ["calibrate", *MODEL, "--trajectories", broken, "--out", out],
        "scales.safetensors": ["export", *MODEL, "--scales", broken, "--out", out],
        "m.onnx": ["sample", "--backend", "onnx", "--onnx", broken, "--out", out],
    }[name]
    refusal(capsys, *command)
    assert not out.exists()


def test_an_altered_manifest_is_refused(files, tmp_path, capsys):
    import onnx

    model = onnx.load(files["m.onnx"])
    entry = next(e for e in model.metadata_props if e.key == "modiff.manifest")
    entry.value = entry.value.replace('"dtype": "fp32"', '"dtype": "fp16"')
    onnx.save(model, tmp_path / "a.onnx")
    model = onnx.load(files["m.onnx"])
    function = model.functions[0]
    next(node for node in function.node if node.op_type == "Mul").op_type = "Div"
    onnx.save(model, tmp_path / "b.onnx")
    for name in ("a", "b"):
        text = refusal(capsys, "sample", "--backend", "onnx", "--onnx", tmp_path / f"{name}.onnx", "--out", tmp_path / "o")
        assert "was altered" in text


def test_nan_in_trajectories_and_scales(files, tmp_path, capsys):
    header, arrays, _ = load_arrays(files["traj.safetensors"], "trajectories", 3)
    arrays["x"][0, 0, 0, 0, 0] = np.nan
    save_arrays(tmp_path / "t.safetensors", header, arrays)
    text = refusal(capsys, "calibrate", *MODEL, "--trajectories", tmp_path / "t.safetensors", "--out", tmp_path / "o")
    assert "NaN" in text
    header, arrays, _ = load_arrays(files["scales.safetensors"], "scales", SCHEMA)
    arrays["layer.conv_in.scales"][1] = np.nan
    save_arrays(tmp_path / "s.safetensors", header, arrays)
    assert "conv_in" in refusal(capsys, "export", *MODEL, "--scales", tmp_path / "s.safetensors", "--out", tmp_path / "o")


def test_scales_of_another_checkpoint(files, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    state = load_file(CKPT)
    state["conv_in.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    model = ["--config", CONFIG, "--ckpt", tmp_path / "other.safetensors"]
    text = refusal(capsys, "export", *model, "--scales", files["scales.safetensors"], "--out", tmp_path / "o.onnx")
    assert "another checkpoint" in text


def test_installed_command_shows_no_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "modiff_trt.tools.cli.main", "sample", "--config", "none.yml", "--ckpt", "none", "--out", "o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("modiff-trt ")


def test_help_names_every_stage_and_both_spellings_exist(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in ("collect", "calibrate", "export", "sample", "demo"))


def test_batch_size_of_calibrate_and_foreign_files(files, tmp_path, capsys):
    job = ["calibrate", *MODEL, "--trajectories", files["traj.safetensors"], "--preset", "fast", "--out", tmp_path / "o"]
    for size in (0, -1):
        assert "--batch-size" in refusal(capsys, *job, "--batch-size", size)
    (tmp_path / "page.pt").write_text("hello")
    (tmp_path / "short.pt").write_bytes(b"\x80\x02.")
    for name in ("page.pt", "short.pt"):
        text = refusal(capsys, "collect", "--config", CONFIG, "--ckpt", tmp_path / name, "--out", tmp_path / "o")
        assert "damaged" in text or "cannot be read safely" in text
    (tmp_path / "n.npz").write_bytes(b"PK\x03\x04 but no archive")
    assert "not a valid" in refusal(capsys, "sample", *MODEL, "--noise", tmp_path / "n.npz", "--out", tmp_path / "o.npz")
    assert "--seed" in refusal(capsys, "sample", *MODEL, "--seed", 2**64, "--timesteps", 2, "--out", tmp_path / "o.npz")
    assert not (tmp_path / "o").exists()


def test_resuming_a_folder_with_other_settings_is_refused(tmp_path, capsys):
    other = tmp_path / "other.yml"
    other.write_text((ROOT / "configs/demo.yml").read_text().replace("beta_end: 0.02", "beta_end: 0.01"))
    job = ["sample", "--ckpt", CKPT, "--timesteps", 2, "--num-samples", 1, "--out", tmp_path / "images"]
    assert run(*job, "--config", CONFIG) == 0
    assert "another run" in refusal(capsys, *job, "--config", other)


def test_layers_without_any_state_are_sampled_from_an_exported_file(files, tmp_path):
    scales = tmp_path / "auto.safetensors"
    job = ["calibrate", *MODEL, "--trajectories", files["traj.safetensors"], "--method", "qdiff", "--out", scales]
    assert run(*job) == 0
    assert run("export", *MODEL, "--scales", scales, "--out", tmp_path / "q.onnx") == 0
    assert (
        run("sample", "--backend", "onnx", "--onnx", tmp_path / "q.onnx", "--num-samples", 1, "--out", tmp_path / "q.npz") == 0
    )


def test_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from modiff_trt.export.calibration import collecting

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting, "sample_trajectory", interrupted)
    assert run("collect", *MODEL, "--timesteps", 3, "--out", tmp_path / "t") == 130
    assert "go on" in capsys.readouterr().err


def test_no_arguments_print_the_help_and_nothing_else(capsys):
    assert run() == 2
    captured = capsys.readouterr()
    assert "collect" in captured.out and captured.err == ""
