"""Folders that diffusers itself wrote: the same answers, the same images, and one line for what this network is not."""

import json
import shutil

import numpy as np
import pytest
import torch

from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import FinalAlpha, Prediction, SolverKind, Spacing
from modiff_trt.networks.binding import times
from modiff_trt.networks.diffusers_folder import KINDS, load_folder, read_folder
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.registry.options import load_model
from modiff_trt.runtime.backends.torch_denoiser import TorchDenoiser
from modiff_trt.runtime.images.folders import to_uint8
from modiff_trt.runtime.sampler import sample_trajectory

diffusers = pytest.importorskip("diffusers")

# What google/ddpm-cifar10-32 has, but for its size.
CIFAR = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
# google/ddpm-celebahq-256, -church-256 and -bedroom-256.
BIG = CIFAR | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
SMALL = CIFAR | {
    "sample_size": 8,
    "dropout": 0.1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def network_of(settings, seed=0):
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**settings).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def pipeline(folder, settings=SMALL, scheduler=None, **how):
    model = network_of(settings)
    diffusers.DDPMPipeline(model, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder, **how)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers") / "small"
    return folder, pipeline(folder)


def relative_difference(folder, model, images=2):
    network, checkpoint = load_model(None, None, model=folder)
    torch.manual_seed(1)
    x = torch.randn(images, *network.config.input_shape)
    t = torch.tensor([3, 981])[:images]
    with torch.no_grad():
        ours = run_unet(network, checkpoint.params, x, bound=times(network, checkpoint.params, t))
        theirs = model(x, t).sample
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_answers_are_those_of_diffusers(saved):
    assert relative_difference(*saved) < 1e-5


def test_the_cifar_network_at_its_size(tmp_path):
    model = pipeline(tmp_path / "c", CIFAR)
    assert relative_difference(tmp_path / "c", model) < 1e-5


def test_the_large_networks_have_the_same_parameters(tmp_path):
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**BIG)
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | dict(model.config)))
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    network = trace(read_folder(folder).config)
    assert network.parameter_count == sum(p.numel() for p in model.parameters()) == 113_673_219
    assert network.config.input_shape == (3, 256, 256) and network.config.architecture.down_heads == (0, 0, 0, 0, 1, 0)


@pytest.mark.parametrize("steps", [10])
def test_a_whole_trajectory_is_that_of_the_pipeline(saved, steps):
    """DDIM with the settings of the folder's own scheduler: leading steps, a clipped sample."""
    folder, model = saved
    network, checkpoint = load_model(None, None, model=folder)
    solver = read_folder(folder).solver
    scheduler = diffusers.DDIMScheduler.from_config(diffusers.DDPMScheduler.from_pretrained(folder / "scheduler").config)
    scheduler.set_timesteps(steps)
    noise = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)
    timesteps = solver.timesteps(network.config.diffusion, steps)
    assert list(timesteps) == scheduler.timesteps.tolist() and solver.clip_sample == 1.0
    ours = sample_trajectory(
        TorchDenoiser(network, checkpoint.params, timesteps), solver.updates(network.config.diffusion, timesteps), noise
    )
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    assert np.abs(to_uint8(ours).astype(int) - to_uint8(x.numpy()).astype(int)).max() <= 1


def test_every_place_and_kind_of_weights(saved, tmp_path):
    folder, _ = saved
    whole = load_model(None, None, model=folder)[1]
    for name, how in {"shards": {"max_shard_size": "200KB"}, "bin": {"safe_serialization": False}}.items():
        pipeline(tmp_path / name, **how)
        found = load_model(None, None, model=tmp_path / name)[1]
        assert all(torch.equal(found.params[key], value) for key, value in whole.params.items())
        assert found.sha256 != whole.sha256
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    # The UNet's own folder inside a pipeline, and both configurations side by side.
    assert load_model(None, None, model=folder / "unet")[1].sha256 == whole.sha256
    flat = tmp_path / "flat"
    shutil.copytree(folder / "unet", flat)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", flat)
    assert load_model(None, None, model=flat)[1].sha256 == whole.sha256
    next(iter((tmp_path / "shards" / "unet").glob("*00002*.safetensors"))).unlink()
    with pytest.raises(InputError, match="is missing, which"):
        load_model(None, None, model=tmp_path / "shards")


def test_names_of_old_files(saved, tmp_path):
    folder, model = saved
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in model.state_dict().items():
        for new, before in old.items():
            key = key.replace(f".{new}.", f".{before}.")
        state[key] = value
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "old/unet/diffusion_pytorch_model.bin")
    found, whole = (load_model(None, None, model=path)[1] for path in (tmp_path / "old", folder))
    assert all(torch.equal(found.params[key], value) for key, value in whole.params.items())


def with_settings(folder, where, **settings):
    file = folder / where
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


SCHEDULERS = {
    "v": (
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False},
        {"prediction": Prediction.V},
    ),
    "sd": (
        {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
        {"steps_offset": 1, "final_alpha": FinalAlpha.FIRST, "clip_sample": None},
    ),
    "dpm": (
        {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"},
        {"kind": SolverKind.DPMPP_2M, "spacing": Spacing.TRAILING, "clip_sample": None},
    ),
    "range": ({"clip_sample_range": 2.0}, {"clip_sample": 2.0, "spacing": Spacing.LEADING}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_settings_of_the_scheduler_are_the_solver(saved, tmp_path, name):
    settings, expected = SCHEDULERS[name]
    shutil.copytree(saved[0], tmp_path / "m")
    solver = read_folder(with_settings(tmp_path / "m", "scheduler/scheduler_config.json", **settings)).solver
    assert {key: getattr(solver, key) for key in expected} == expected


MODEL, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
REFUSED = {
    "a transformer": (MODEL, {"_class_name": "DiTTransformer2DModel"}, "DiTTransformer2DModel"),
    "a prompted network's blocks": (
        MODEL,
        {"_class_name": "UNet2DConditionModel"},
        "'mid_block_type' 'UNetMidBlock2D' is not supported",
    ),
    "class labels": (MODEL, {"num_class_embeds": 10}, "missing class_embedding.weight"),
    "labels that are no numbers": (MODEL, {"class_embed_type": "timestep"}, "'class_embed_type' 'timestep'"),
    "an image's encoder": (MODEL, {"encoder_hid_dim": 64}, "'encoder_hid_dim' 64"),
    "a spatial embedding": (MODEL, {"resnet_time_scale_shift": "spatial"}, "'resnet_time_scale_shift'"),
    "heads": (MODEL, {"attention_head_dim": 24}, "'attention_head_dim' 24"),
    "groups": (MODEL, {"norm_num_groups": 24}, "multiples of the 24 groups"),
    "groups of attention": (MODEL, {"attn_norm_num_groups": 16}, "'attn_norm_num_groups'"),
    "another size": (MODEL, {"sample_size": 9}, "9 is not divisible by 2"),
    "other output": (MODEL, {"out_channels": 6}, "'out_channels' 6"),
    "no convolution": (MODEL, {"downsample_type": "nearest"}, "'downsample_type'"),
    "other blocks": (MODEL, {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
    "a side too long": (MODEL, {"up_block_types": ["UpBlock2D"] * 3}, "damaged ones"),
    "damaged": (MODEL, {"block_out_channels": "wide"}, "damaged ones"),
    "no row table": (SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
    "thresholding": (SCHEDULER, {"thresholding": True}, "'thresholding'"),
    "zero terminal SNR": (SCHEDULER, {"rescale_betas_zero_snr": True}, "'rescale_betas_zero_snr'"),
    "cosine betas": (SCHEDULER, {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
    "spacing": (SCHEDULER, {"timestep_spacing": "odd"}, "'timestep_spacing'"),
    "not diffusers'": (SCHEDULER, {"_class_name": None}, "no '_class_name'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(saved, tmp_path, name):
    where, settings, why = REFUSED[name]
    shutil.copytree(saved[0], tmp_path / "m")
    with pytest.raises(InputError, match=why) as refused:
        load_model(None, None, model=with_settings(tmp_path / "m", where, **settings))
    assert "\n" not in str(refused.value)


def test_folders_that_lack_something(saved, tmp_path):
    def without(*names):
        folder = tmp_path / names[0].replace("/", "-")
        shutil.copytree(saved[0], folder)
        for name in names:
            (folder / name).unlink()
        return folder

    for folder, why in {
        tmp_path / "none": "is no folder",
        without("unet/config.json"): "has no config.json",
        without("scheduler/scheduler_config.json"): "has no scheduler_config.json",
        without("unet/diffusion_pytorch_model.safetensors"): "has no weights",
    }.items():
        with pytest.raises(InputError, match=why):
            load_model(None, None, model=folder)
    with pytest.raises(InputError, match="leave these out"):
        load_model(saved[0] / "config.yml", None, model=saved[0])
    folder = read_folder(saved[0])
    other = trace(read_folder(saved[0]).config)
    state = tmp_path / "other"
    pipeline(state, SMALL | {"layers_per_block": 2})
    with pytest.raises(InputError, match="unexpected"):
        load_folder(read_folder(state), other)
    assert set(KINDS) >= {"DDPMScheduler", "DDIMScheduler"} and folder.config.architecture.channels == (32, 64)
