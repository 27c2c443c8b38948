"""Latent diffusion and Stable Diffusion as CompVis published them: names by diffusers' own converter, attention by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config

from modiff_trt.core.compvis_yaml import compvis_config
from modiff_trt.core.ddim_yaml import config_solver, load_config
from modiff_trt.core.errors import InputError
from modiff_trt.core.kinds import FinalAlpha, Prediction, Spacing
from modiff_trt.networks.binding import bind
from modiff_trt.networks.checkpoint import load_checkpoint
from modiff_trt.networks.compvis_names import compvis_names, with_parts
from modiff_trt.networks.torch_ops import TorchOps, float_layer, run_unet
from modiff_trt.networks.unet2d import trace

diffusers = pytest.importorskip("diffusers")

NETWORK = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 24,
    "use_checkpoint": True,
    "legacy": False,
}


def tree(network=NETWORK, **params):
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    settings = {"linear_start": 0.00085, "linear_end": 0.0120, "timesteps": 1000, "first_stage_config": {"target": "x"}}
    unet = {"target": target, "params": network}
    return {"model": {"base_learning_rate": 1e-4, "target": "x", "params": settings | params | {"unet_config": unet}}}


def config_file(folder: Path, content) -> Path:
    file = folder / "v1.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def stable():
    """The same network by diffusers, with random weights."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def as_published(state, network):
    """A checkpoint of the whole pipeline: the UNet, its average, a text encoder and an autoencoder."""
    names = compvis_names(network)
    unet = {f"model.diffusion_model.{names[key]}": value for key, value in state.items()}
    averaged = {"model_ema." + key.removeprefix("model.").replace(".", ""): value + 1 for key, value in unet.items()}
    others = {"first_stage_model.conv.weight": torch.zeros(2), "cond_stage_model.text.weight": torch.zeros(3)}
    return {"state_dict": unet | averaged | others | {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(4)}}


def test_stable_diffusion_is_that_of_diffusers(tmp_path):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = stable()
    network = trace(load_config(config_file(tmp_path, tree())))
    content = as_published(model.state_dict(), network)
    # diffusers reads the file as the network that it was made from: the names are CompVis'.
    plain = {key: value for key, value in content["state_dict"].items() if not key.startswith("model_ema")}
    converted = convert_ldm_unet_checkpoint(plain, dict(model.config))
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
    torch.save(content, tmp_path / "sd.ckpt")
    raw, averaged = (load_checkpoint(tmp_path / "sd.ckpt", network, kind) for kind in ("raw", None))
    assert averaged.weights.startswith("ema")
    assert torch.equal(averaged.params["conv_in.bias"], model.conv_in.bias + 1)
    x, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([1, 981]), torch.randn(2, 7, 24)
    with torch.no_grad():
        ours = run_unet(network, raw.params, x, bound=bind(network, raw.params, t, {"encoder_hidden_states": prompt}))
        theirs = model(x, t, prompt).sample
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_a_file_of_another_program_does_not_pass_for_it(tmp_path):
    """Nor a CompVis file for a DDIM configuration: its names are not looked for."""
    model = stable()
    network = trace(load_config(config_file(tmp_path, tree())))
    torch.save(dict(model.state_dict()), tmp_path / "d.pt")
    with pytest.raises(InputError, match="diffusers UNet"):
        load_checkpoint(tmp_path / "d.pt", network)
    torch.save(as_published(model.state_dict(), network), tmp_path / "sd.ckpt")
    with pytest.raises(InputError, match="latent diffusion"):
        load_checkpoint(tmp_path / "sd.ckpt", trace(tiny_config()))


def test_its_sampler_is_the_default(tmp_path):
    solver = config_solver(config_file(tmp_path, tree(parameterization="v")))
    assert (solver.spacing, solver.steps_offset, solver.final_alpha) == (Spacing.LEADING, 1, FinalAlpha.FIRST)
    assert solver.prediction is Prediction.V and solver.clip_sample is None
    config = load_config(config_file(tmp_path, tree()))
    # CompVis: range(0, 1000, 1000 // 4) + 1.
    assert list(solver.timesteps(config.diffusion, 4)) == [751, 501, 251, 1] and config.latent


def test_attention_of_pixels_has_its_parts_head_by_head():
    """As latent diffusion's `QKVAttentionLegacy` splits them: heads first, then q, k and v."""
    channels, heads = 64, 4
    unconditional = {
        k: v for k, v in NETWORK.items() if k not in ("use_spatial_transformer", "transformer_depth", "context_dim")
    }

    network = trace(compvis_config(tree(unconditional | {"num_heads": heads}), "x")[0])
    torch.manual_seed(0)
    weight, bias = torch.randn(3 * channels, channels, 1), torch.randn(3 * channels)
    state = {"middle_block.1.qkv.weight": weight, "middle_block.1.qkv.bias": bias}
    found = with_parts(state, network)
    x = torch.randn(2, channels, 2, 2)
    qkv = torch.einsum("oi,nit->not", weight[:, :, 0], x.flatten(2)) + bias[:, None]
    q, k, v = qkv.reshape(2 * heads, 3 * channels // heads, 4).split(channels // heads, dim=1)
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / (channels // heads) ** 0.5, dim=-1)
    expected = torch.einsum("bts,bcs->bct", weights, v).reshape(2, channels, 2, 2)
    joined = [
        torch.cat([found[f"middle_block.1.{part}.{leaf}"] for part in ("to_q", "to_k", "to_v")]) for leaf in ("weight", "bias")
    ]
    ours = torch.nn.functional.conv2d(x, joined[0][:, :, None, None], joined[1])
    params: dict = {}
    answer = TorchOps(params, {}, float_layer(params)).attention(ours, channels, heads)
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


REFUSED = {
    "another network": ({}, {}, "some.other.UNet"),
    "classes": ({"num_classes": 1000}, {}, "'num_classes' 1000"),
    "resampling blocks": ({"resblock_updown": True}, {}, "'resblock_updown'"),
    "an unknown key": ({"attention_type": "linear"}, {}, "'attention_type' is not known"),
    "no width": ({"model_channels": None}, {}, "damaged ones"),
    "inpainting": ({"in_channels": 9}, {}, "'out_channels' 4"),
    "a schedule": ({}, {"beta_schedule": "cosine"}, "'beta_schedule' 'cosine'"),
    "a prediction": ({}, {"parameterization": "flow"}, "'parameterization' 'flow'"),
    "a prompt of no width": ({"context_dim": None}, {}, "needs 'context_dim'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_be_is_refused_by_name(tmp_path, name):
    network, params, why = REFUSED[name]
    content = tree(NETWORK | network, **params)
    if name == "another network":
        content["model"]["params"]["unet_config"]["target"] = "some.other.UNet"
    with pytest.raises(InputError, match=why) as refused:
        load_config(config_file(tmp_path, content))
    assert "\n" not in str(refused.value)
