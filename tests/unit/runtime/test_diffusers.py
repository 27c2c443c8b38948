"""In diffusers' own pipelines the quantized network gives the images of `sample`, on the steps that it was made for alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from command import run
from small_diffusers import PIXELS, PROMPTED, diffusers, random_network

from modiff_trt.core.errors import InputError
from modiff_trt.core.scales import load_scales
from modiff_trt.diffusers import ModiffPipeline, ModiffUNet
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.registry.options import load_model
from modiff_trt.runtime.sampler import sample_trajectory

STEPS = 4


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """(a DDPM pipeline, its folder, the folder that `quantize` made of it)."""
    folder = tmp_path_factory.mktemp("pixels")
    model = random_network("UNet2DModel", PIXELS)
    pipe = diffusers.DDIMPipeline(model, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "m")
    job = ["--model", folder / "m", "--timesteps", STEPS, "--num-samples", 2, "--preset", "fast", "--min-intensity", 0]
    assert run("quantize", *job, "--out", folder / "q") == 0
    return pipe, folder / "m", folder / "q"


@pytest.mark.parametrize("backend", ["native", "torch-sim"])
def test_a_stock_pipeline_makes_the_images_of_sample(pixels, backend):
    pipe, folder, quantized = pixels
    unet = ModiffUNet.from_pretrained(folder, quantized / "scales.safetensors", backend=backend)
    exact, pipe.unet = pipe.unet, unet
    try:
        images = [
            pipe(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np").images
            for _ in range(2)
        ]
        with pytest.raises(InputError, match=f"pass num_inference_steps={STEPS}"):
            pipe(batch_size=1, num_inference_steps=STEPS + 1, output_type="np")
    finally:
        pipe.unet = exact
    # State begins anew with every call.
    np.testing.assert_array_equal(*images)
    network, checkpoint = load_model(None, None, model=folder)
    scales = load_scales(quantized / "scales.safetensors")
    make = trained.native if backend == "native" else trained.simulated
    updates = scales.solver.updates(network.config.diffusion, scales.rows.timesteps)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).numpy()

    def pictures(denoiser):
        return (sample_trajectory(denoiser, updates, noise).transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1)

    apart = np.abs(images[0] - pictures(make(network, checkpoint.params, scales, "cpu"))).mean()
    without_state = make(network, checkpoint.params, scales.without_modulation(), "cpu")
    assert apart < 1e-3 < np.abs(images[0] - pictures(without_state)).mean()


def test_the_folder_is_a_pipeline(pixels):
    _, _, folder = pixels
    pipe = ModiffPipeline.from_pretrained(folder)
    one, again = (pipe(batch_size=2, generator=torch.Generator().manual_seed(3)).images for _ in range(2))
    assert [image.size for image in one] == [(8, 8)] * 2 and one[0].mode == "RGB"
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    array = pipe(batch_size=1, generator=np.random.default_rng(0), num_inference_steps=STEPS, output_type="np").images
    assert array.shape == (1, 8, 8, 3) and array.min() >= 0 and array.max() <= 1
    with pytest.raises(InputError, match=f"num_inference_steps={STEPS}"):
        pipe(num_inference_steps=50)
    with pytest.raises(InputError, match="output_type"):
        pipe(output_type="latent")


def test_a_folder_of_latents_is_no_pipeline(pixels, tmp_path):
    """Latents of three channels would pass for pictures. The autoencoder's own folder need not be there."""
    _, folder, _ = pixels
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/model_index.json").write_text(json.dumps({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}))
    job = ["--model", tmp_path / "m", "--timesteps", STEPS, "--num-samples", 2, "--preset", "fast", "--min-intensity", 0]
    assert run("quantize", *job, "--out", tmp_path / "q") == 0
    with pytest.raises(InputError, match="or of latents"):
        ModiffPipeline.from_pretrained(tmp_path / "q")
    sample = ["sample", "--backend", "onnx", "--onnx", tmp_path / "q" / "network.onnx", "--num-samples", 1]
    assert run(*sample, "--out", tmp_path / "pictures") == 2
    assert run(*sample, "--out", tmp_path / "latents.npz") == 0


def test_stable_diffusion_passes_prompts_and_both_halves(tmp_path):
    unet = random_network("UNet2DConditionModel", PROMPTED)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    folder = tmp_path / "sd"
    for name, part in (("unet", unet), ("scheduler", scheduler)):
        part.save_pretrained(folder / name)
    prompts = {
        name: torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(seed))
        for name, seed in (("encoder_hidden_states", 1), ("negative_encoder_hidden_states", 2))
    }
    np.savez(tmp_path / "c.npz", **{k: v.numpy() for k, v in prompts.items()})
    trajectories, file = tmp_path / "t.safetensors", tmp_path / "s.safetensors"
    prompted = ["--context", tmp_path / "c.npz", "--guidance", 4]
    job = ["--model", folder]
    assert run("collect", *job, *prompted, "--timesteps", STEPS, "--num-samples", 2, "--out", trajectories) == 0
    options = ["--preset", "fast", "--min-intensity", 0, "--trial-images", 0]
    assert run("calibrate", *job, "--trajectories", trajectories, *options, "--out", file) == 0
    quantized = ModiffUNet.from_pretrained(folder, file)
    pipe = diffusers.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = quantized
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = pipe(
        prompt_embeds=prompts["encoder_hidden_states"],
        negative_prompt_embeds=prompts["negative_encoder_hidden_states"],
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        latents=noise,
        output_type="latent",
    ).images.numpy()
    network, checkpoint = load_model(None, None, model=folder)
    scales = load_scales(file)
    denoiser = guided(trained.native(network, checkpoint.params, scales), (context := _context(prompts)))
    updates = scales.solver.updates(network.config.diffusion, scales.rows.timesteps)
    expected = sample_trajectory(denoiser, updates, noise.numpy(), context=context.of([0]))
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-3
    with pytest.raises(InputError, match="needs encoder_hidden_states"):
        quantized(noise, quantized.timesteps[0])
    # An adapter's images come in the same dictionary as SDXL's sizes.
    with pytest.raises(InputError, match="does not take image_embeds"):
        given = {"encoder_hidden_states": prompts["encoder_hidden_states"], "added_cond_kwargs": {"image_embeds": noise}}
        quantized(noise, quantized.timesteps[0], **given)
    with pytest.raises(InputError, match="does not take mid_block_additional_residual"):
        quantized(noise, quantized.timesteps[0], mid_block_additional_residual=noise)


def _context(prompts):
    from modiff_trt.core.context import Context

    sides = [{"encoder_hidden_states": prompts[f"{side}encoder_hidden_states"].numpy()} for side in ("", "negative_")]
    return Context(*sides, 4.0)
