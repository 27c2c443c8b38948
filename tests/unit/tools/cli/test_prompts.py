"""A Stable Diffusion folder of random parts through the commands: its latents are the pipeline's, its files take prompts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from command import alone, run
from small_diffusers import PROMPTED, diffusers, random_network

from modiff_trt.core.scales import load_scales
from modiff_trt.networks.diffusers_folder import read_folder
from modiff_trt.networks.state_elements import state_elements
from modiff_trt.networks.unet2d import trace
from modiff_trt.plugins.modulated_conv.tensorrt.library import is_installed
from modiff_trt.runtime.backends.plan import load_plan

STEPS, GUIDANCE, TOKENS, WIDTH = 4, 5.0, 7, 24


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """(the pipeline, its folder, a file of two prompts)."""
    folder = tmp_path_factory.mktemp("stable")
    unet = random_network("UNet2DConditionModel", PROMPTED)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for name, part in (("unet", unet), ("vae", vae), ("scheduler", scheduler)):
        part.save_pretrained(folder / "sd" / name)
    generator = torch.Generator().manual_seed(1)
    prompts = {
        name: torch.randn(2, TOKENS, WIDTH, generator=generator).numpy()
        for name in ("encoder_hidden_states", "negative_encoder_hidden_states")
    }
    np.savez(folder / "prompts.npz", **prompts)
    return pipe, folder / "sd", folder / "prompts.npz"


def latents(file):
    with np.load(file) as archive:
        return archive["samples"]


def test_latents_are_those_of_the_pipeline(stable, tmp_path):
    pipe, folder, prompts = stable
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    np.save(tmp_path / "x.npy", noise)
    job = ["--model", folder, "--context", prompts, "--guidance", GUIDANCE, "--timesteps", STEPS, "--num-samples", 2]
    assert run("sample", *job, "--noise", tmp_path / "x.npy", "--out", tmp_path / "s.npz") == 0
    with np.load(prompts) as archive:
        given = {k: torch.from_numpy(v) for k, v in archive.items()}
    expected = pipe(
        prompt_embeds=given["encoder_hidden_states"],
        negative_prompt_embeds=given["negative_encoder_hidden_states"],
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        latents=torch.from_numpy(noise),
        output_type="latent",
    ).images.numpy()
    ours = latents(tmp_path / "s.npz")
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-4


def test_the_whole_method_takes_prompts_and_guidance(stable, tmp_path, capsys):
    _, folder, prompts = stable
    trajectories, scales, onnx = (tmp_path / name for name in ("t.safetensors", "s.safetensors", "n.onnx"))
    prompted = ["--context", prompts, "--guidance", GUIDANCE]
    model = ["--model", folder]
    assert run("collect", *model, *prompted, "--timesteps", STEPS, "--num-samples", 3, "--out", trajectories) == 0
    options = ["--min-intensity", 0, "--trial-images", 2, "--rounding", "adaround", "--iterations", 5]
    assert run("calibrate", *model, "--trajectories", trajectories, *options, "--out", scales) == 0
    assert any("attn2.to_q" in name for name in load_scales(scales).modulated)
    assert run("export", *model, "--scales", scales, "--out", onnx) == 0
    few = [*prompted, "--num-samples", 3, "--out"]
    made = {
        "native": ["--backend", "native", *model, "--scales", scales],
        "sim": ["--backend", "torch-sim", *model, "--scales", scales],
        "onnx": ["--backend", "onnx", "--onnx", onnx],
        "exact": [*model, "--timesteps", STEPS],
    }
    for name, options in made.items():
        assert run("sample", *options, *few, tmp_path / f"{name}.npz") == 0
    exact = latents(tmp_path / "exact.npz")
    for name in ("native", "sim", "onnx"):
        apart = np.linalg.norm(latents(tmp_path / f"{name}.npz") - exact) / np.linalg.norm(exact)
        assert 1e-6 < apart < 0.5, name
    # The third image has the first prompt again, and another noise; without its prompt it is another image.
    assert run("sample", *made["native"], "--context", prompts, "--num-samples", 3, "--out", tmp_path / "u.npz") == 0
    assert not np.allclose(latents(tmp_path / "u.npz"), latents(tmp_path / "native.npz"), atol=1e-2)
    # One at a time they are the same.
    assert run("sample", *made["native"], *few, tmp_path / "one.npz", "--batch-size", 1) == 0
    np.testing.assert_array_equal(latents(tmp_path / "one.npz"), latents(tmp_path / "native.npz"))
    capsys.readouterr()
    assert run("sample", *made["native"], *few, tmp_path / "pictures") == 2
    said = capsys.readouterr().err
    assert "4 channels, which are no pictures" in said and said.count("error: ") == 1
    # The deployed sampler makes the same latents, and no pictures.
    assert run("package", "--onnx", onnx, "--out", tmp_path / "sampler") == 0
    launcher = [sys.executable, tmp_path / "sampler/modiff-sampler", *prompted, "-n", 3, "-o"]
    codes = [
        subprocess.run([*map(str, launcher), str(tmp_path / place)], capture_output=True, text=True, check=False)
        for place in ("deployed.npz", "deployed")
    ]
    assert [done.returncode for done in codes] == [0, 2], codes
    assert "4 channels, which are no pictures" in codes[1].stderr and codes[1].stderr.count("\n") == 1
    np.testing.assert_array_equal(latents(tmp_path / "deployed.npz"), latents(tmp_path / "onnx.npz"))
    # Half precision between layers, with the context as it is.
    half = tmp_path / "half.onnx"
    assert run("export", *model, "--scales", scales, "--dtype", "fp16", "--out", half) == 0
    assert run("sample", "--backend", "onnx", "--onnx", half, *few, tmp_path / "half.npz") == 0
    apart = np.linalg.norm(latents(tmp_path / "half.npz") - exact) / np.linalg.norm(exact)
    assert 1e-6 < apart < 0.5


@pytest.fixture(scope="module")
def quantized(stable, tmp_path_factory):
    """A folder with trajectories and scales of a network with prompts, every layer modulated."""
    _, folder, prompts = stable
    base = tmp_path_factory.mktemp("quantized")
    model = ["--model", folder]
    job = [*model, "--context", prompts, "--guidance", GUIDANCE, "--timesteps", STEPS, "--num-samples", 2]
    assert run("collect", *job, "--out", base / "t.safetensors") == 0
    options = ["--min-intensity", 0, "--trial-images", 0, "--preset", "fast"]
    assert run("calibrate", *model, "--trajectories", base / "t.safetensors", *options, "--out", base / "s.safetensors") == 0
    return base


@pytest.mark.parametrize(
    ("exported", "built"), [([], []), ([], ["--no-plugin"]), (["--inline"], ["--no-plugin"])], ids=["plugin", "inlined", "file"]
)
def test_plans_take_prompts(stable, quantized, tmp_path, capsys, exported, built):
    if not is_installed("rtx"):
        pytest.skip("pip install 'modiff-trt[rtx]'")
    _, folder, _ = stable
    onnx = tmp_path / "n.onnx"
    model = ["--model", folder, "--scales", quantized / "s.safetensors"]
    assert run("export", *model, "--dtype", "fp16", *exported, "--out", onnx) == 0
    job = ["--runtime", "rtx", "--target", "sm89", "--tokens", TOKENS, "--max-batch", 4]
    done = alone("build", "--onnx", onnx, "--out", tmp_path, *job, *built)
    assert done.returncode == 0, done.stderr
    file = next(tmp_path.glob("*.plan"))
    plan = load_plan(file)
    report = plan.manifest["report"]
    assert plan.tokens == TOKENS and report["fell_back"] == []
    assert report["plugin_layers"] + report["quantized_layers_in_int8"] == report["quantized_layers"] > 20
    capsys.readouterr()
    assert run("sample", "--backend", "trt", "--plan", file, "--num-samples", 1, "--out", tmp_path / "s.npz") == 2
    assert "pass --context FILE.npz with encoder_hidden_states" in capsys.readouterr().err


def test_an_inlined_file_is_the_same_network(stable, quantized, tmp_path, capsys):
    """Its images are those of the file with functions, from the same start; and no plugin is asked for in vain."""
    _, folder, prompts = stable
    images = {}
    for name, options in {"functions": [], "inlined": ["--inline"]}.items():
        onnx = tmp_path / f"{name}.onnx"
        assert run("export", "--model", folder, "--scales", quantized / "s.safetensors", *options, "--out", onnx) == 0
        few = ["--context", prompts, "--guidance", GUIDANCE, "--num-samples", 2, "--out", tmp_path / f"{name}.npz"]
        assert run("sample", "--backend", "onnx", "--onnx", onnx, *few) == 0
        images[name] = latents(tmp_path / f"{name}.npz")
    np.testing.assert_allclose(images["functions"], images["inlined"], rtol=0, atol=1e-4)
    assert onnx_functions(tmp_path / "functions.onnx") and not onnx_functions(tmp_path / "inlined.onnx")
    capsys.readouterr()
    assert run("build", "--onnx", tmp_path / "inlined.onnx", "--out", tmp_path, "--target", "sm89") == 2
    assert "build with --no-plugin" in capsys.readouterr().err


def onnx_functions(file):
    import onnx

    return len(onnx.load(file).functions)


PARSE = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
sys.exit(0 if parser.parse(open(sys.argv[1], "rb").read()) else 7)
"""


def test_another_parser_reads_the_inlined_file_as_it_is(stable, quantized, tmp_path):
    """As `trtexec --onnx=FILE` does: TensorRT's own parser in a process that has nothing of this program. It cannot read the
    file with functions, for which the documents name `export --inline`."""
    if not is_installed("rtx"):
        pytest.skip("pip install 'modiff-trt[rtx]'")
    _, folder, _ = stable
    read = {}
    for options in ([], ["--inline"]):
        onnx = tmp_path / f"{len(options)}.onnx"
        model = ["--model", folder, "--scales", quantized / "s.safetensors", "--dtype", "fp16"]
        assert run("export", *model, *options, "--out", onnx) == 0
        read[len(options)] = subprocess.run([sys.executable, "-c", PARSE, onnx], capture_output=True, check=False).returncode
    assert read[1] == 0 and read[0] != 0


REFUSED = {
    "no context": ([], "pass --context FILE.npz with encoder_hidden_states [N, S, 24]"),
    "no file": (["--context", "none.npz"], "does not exist"),
    "no archive": (["--context", "BROKEN"], "is no .npz file of arrays"),
    "another name": (["--context", {"prompt_embeds": (2, 7, 24)}], "has an array 'prompt_embeds'"),
    "another width": (["--context", {"encoder_hidden_states": (2, 7, 32)}], "has shape [2, 7, 32], and should have [N, S, 24]"),
    "nothing to lead away from": (
        ["--context", {"encoder_hidden_states": (7, 24)}, "--guidance", 3],
        "no 'negative_encoder_hidden_states' [N, S, 24], which --guidance needs",
    ),
    "tokens apart": (
        ["--context", {"encoder_hidden_states": (7, 24), "negative_encoder_hidden_states": (5, 24)}, "--guidance", 3],
        "5 tokens",
    ),
    "no number": (["--context", {"encoder_hidden_states": float("nan")}], "must hold finite numbers"),
    "a negative guidance": (["--context", {"encoder_hidden_states": (7, 24)}, "--guidance", -1], "--guidance must lie between"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_contexts_are_refused_in_one_line(stable, tmp_path, capsys, name):
    options, why = REFUSED[name]
    file = tmp_path / "c.npz"
    for option in options:
        if isinstance(option, dict):
            arrays = {k: np.full((7, 24), v) if isinstance(v, float) else np.zeros(v, np.float32) for k, v in option.items()}
            np.savez(file, **arrays)
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    options = [file if isinstance(o, dict) else tmp_path / "broken.npz" if o == "BROKEN" else o for o in options]
    assert run("collect", "--model", stable[1], *options, "--timesteps", 4, "--out", tmp_path / "t.safetensors") == 2
    captured = capsys.readouterr()
    assert why in captured.err.replace("\n", " ").replace("  ", " ") and not captured.out
    assert not (tmp_path / "t.safetensors").exists()


def test_a_report_of_latents_is_refused(stable, tmp_path, capsys):
    assert run("report", "--model", stable[1], "--scales", "s", "--out", tmp_path / "out") == 2
    assert "this network makes latents" in capsys.readouterr().err


def test_backends_are_timed_with_prompts(stable, quantized, tmp_path, capsys):
    _, folder, prompts = stable
    out, costs = tmp_path / "bench.json", tmp_path / "costs.json"
    job = ["bench", "--model", folder, "--scales", quantized / "s.safetensors", "--num-runs", 1, "--num-passes", 2]
    backends = "torch-fp32,torch-sim,native-int8,native-modiff,onnxruntime-modiff"
    assert run(*job, "--out", out) == 2
    assert "pass --context FILE.npz" in capsys.readouterr().err and not out.exists()
    prompted = ["--context", prompts, "--guidance", GUIDANCE, "--batch-sizes", "1,2"]
    assert run(*job, *prompted, "--backends", backends, "--out", out) == 0
    result = json.loads(out.read_text())
    assert result["guidance"] == GUIDANCE and not result["not_run"]
    for rows in result["batches"].values():
        assert list(rows) == backends.split(",")
        # Each image that is made has the state of the two that the network sees, whoever combines them.
        of_native, of_sim = rows["native-modiff"]["state_bytes_an_image"], rows["torch-sim"]["state_bytes_an_image"]
        assert of_native > 0 and of_sim > 0 and rows["native-int8"]["state_bytes_an_image"] == 0
    assert run(*job, *prompted[:-1], "1", "--backends", "native-modiff", "--costs", costs, "--out", out) == 0
    assert json.loads(costs.read_text())["batches"]["1"]["whole"] > 0


def test_one_command_quantizes_with_prompts(stable, tmp_path, capsys):
    _, folder, prompts = stable
    job = ["quantize", "--model", folder, "--timesteps", STEPS, "--num-samples", 2, "--preset", "fast", "--min-intensity", 0]
    prompted = [*job, "--context", prompts, "--guidance", GUIDANCE, "--out", tmp_path / "q"]
    assert run(*prompted) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "[4/5] report: none, since it shows pictures" in said
    assert f"--context {prompts} --guidance 5 --num-samples 16 --out FILE.npz" in said
    # Each image that is made has the state of the two that the network sees.
    card, scales = (tmp_path / "q" / "README.md").read_text(), load_scales(tmp_path / "q" / "scales.safetensors")
    state = 2 * 2 * sum(state_elements(scales, trace(read_folder(folder).config)).values())
    assert card.startswith("# sd, MoDiff W8A8\n") and f"| state | {state / 1e6:.1f} MB an image" in card
    assert "ModiffPipeline" not in card  # which is of pictures made from noise alone
    sample = ["sample", "--backend", "onnx", "--onnx", tmp_path / "q" / "network.onnx", "--context", prompts]
    assert run(*sample, "--num-samples", 1, "--out", tmp_path / "s.npz") == 0
    # Another guidance is another quantization.
    assert run(*prompted[:-3], 2, "--out", tmp_path / "q") == 2
    assert run(*job, "--out", tmp_path / "p") == 2
    said = capsys.readouterr().err
    assert "with another guidance" in said and "pass --context FILE.npz" in said and not (tmp_path / "p").exists()
