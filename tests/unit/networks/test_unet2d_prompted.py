"""Networks that are given more than an image and a timestep: diffusers' own answers, at the layouts that people have."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_case
from native_snapped import Snapped
from onnx_lockstep import all_modulated, passes
from small_diffusers import PIXELS, PROMPTED, diffusers, random_network

from modiff_trt.core.context import Context, context_arrays
from modiff_trt.export.onnx.network import build_onnx
from modiff_trt.networks.binding import bind
from modiff_trt.networks.diffusers_folder import load_folder, read_folder
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.native.cpu_kernels import CpuKernels
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser, TorchDenoiser
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory

TOKENS, IMAGES = 5, 2
CONDITION = "UNet2DConditionModel"
LAYOUTS = {
    "Stable Diffusion 1.5": (CONDITION, PROMPTED),
    "Stable Diffusion 2.1": (
        CONDITION,
        PROMPTED | {"attention_head_dim": (4, 8), "use_linear_projection": True},
    ),
    "SDXL": (
        CONDITION,
        PROMPTED
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 68,
        },
    ),
    "LDM of ImageNet's classes": (
        CONDITION,
        PROMPTED | {"in_channels": 3, "out_channels": 3, "attention_head_dim": 1, "cross_attention_dim": 16},
    ),
    "prompts and class labels": (
        CONDITION,
        PROMPTED | {"num_class_embeds": 10, "resnet_time_scale_shift": "scale_shift"},
    ),
    "class labels of pixels": (
        "UNet2DModel",
        PIXELS | {"num_class_embeds": 10},
    ),
}


def random_context(network, images=IMAGES, seed=2):
    """A context of random arrays, by diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, array in context_arrays(network.config.architecture).items():
        size = [images, *(TOKENS if n == "S" else n for n in array.shape)]
        found[name] = (
            torch.randint(0, network.config.architecture.classes, size, generator=generator)
            if array.integer
            else torch.randn(size, generator=generator) * (100 if name == "time_ids" else 1)
        )
    return found


def answer(model, x, t, context):
    """What diffusers' network says."""
    rest = dict(context)
    more = {}
    if "encoder_hidden_states" in rest:
        more["encoder_hidden_states"] = rest.pop("encoder_hidden_states")
    if "class_labels" in rest:
        more["class_labels"] = rest.pop("class_labels")
    if rest:
        more["added_cond_kwargs"] = rest
    with torch.no_grad():
        return model(x, t, **more).sample


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request, tmp_path_factory):
    """(diffusers' network, ours, its weights)."""
    folder = tmp_path_factory.mktemp("prompted")
    model = random_network(*LAYOUTS[request.param])
    model.save_pretrained(folder)
    diffusers.DDIMScheduler().save_pretrained(folder)
    found = read_folder(folder)
    network = trace(found.config)
    return model, network, load_folder(found, network)


def inputs(network):
    torch.manual_seed(1)
    return torch.randn(IMAGES, *network.config.input_shape), torch.tensor([3, 981]), random_context(network)


def test_answers_are_those_of_diffusers(layout):
    model, network, checkpoint = layout
    x, t, context = inputs(network)
    with torch.no_grad():
        ours = run_unet(network, checkpoint.params, x, bound=bind(network, checkpoint.params, t, context))
    theirs = answer(model, x, t, context)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert network.parameter_count == sum(p.numel() for p in model.parameters())


def test_the_exported_file_takes_the_context_as_inputs(layout, tmp_path):
    model, network, checkpoint = layout
    file = tmp_path / "float.onnx"
    file.write_bytes(build_onnx(network, checkpoint, None, "fp32", None).SerializeToString())
    x, t, context = inputs(network)
    feed = {"x": x, "t": t, **context}
    session = onnxruntime.InferenceSession(file)
    assert {i.name for i in session.get_inputs()} == set(feed)
    (ours,) = session.run(["eps"], {name: value.numpy() for name, value in feed.items()})
    theirs = answer(model, x, t, context).numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


@pytest.fixture(scope="module", params=[None, 3.0], ids=["plain", "guided"])
def case(request, layout):
    """Calibrated on its own trajectories, with a line of the context for each image, and guidance where it has any."""
    _, network, checkpoint = layout
    arrays = [{k: v.numpy() for k, v in random_context(network, seed=seed).items()} for seed in (3, 4)]
    context = Context(arrays[0], arrays[1] if request.param else {}, request.param)
    return make_case(network, checkpoint, 5, 2, 5, context=context)


def answers(case, denoiser):
    """What a denoiser says at each of its rows to the images of the float trajectory."""
    denoiser, context, x = guided(denoiser, case.trajectories.context), case.trajectories.context, case.trajectories.x
    denoiser.reset(x.shape[1], context.of(range(x.shape[1])))
    rows = enumerate(denoiser.rows.t)
    return [denoiser.to_host(denoiser(denoiser.from_host(x[case.timesteps.index(t)]), row)) for row, t in rows]


def apart(a, b, exact):
    """The mean distance of two rows of answers, relative to the exact ones."""
    return np.mean([np.linalg.norm(p - q) / np.linalg.norm(r) for p, q, r in zip(a, b, exact, strict=True)])


def test_native_integers_are_those_of_the_simulation(case):
    """But for values at the edge of two steps, which random weights and guidance enlarge."""
    network, params, scales = case.network, case.checkpoint.params, case.scales()
    assert len(scales.modulated) > len(network.layers) // 2
    native = answers(case, NativeDenoiser(network, params, scales, CpuKernels(), "cpu"))
    snapped, exact = answers(case, Snapped(case, scales)), answers(case, case.float_denoiser())
    exact = [exact[case.timesteps.index(t)] for t in scales.rows.t]
    assert apart(native, snapped, exact) < apart(snapped, exact, exact) / 2


def test_grids_that_follow_each_image_take_a_transformer_s_inputs_too(case):
    """Their step is known once the whole input is: a layer norm and GEGLU are then computed before. Without state rows and
    images have nothing to do with each other: in some no value stands at the edge of two steps, and there both are equal."""
    if case.trajectories.context.guidance is not None:
        pytest.skip("twice the values, and guidance enlarges those at an edge")
    network, params, scales = case.network, case.checkpoint.params, case.scales(granularity="tensor", method="qdiff")
    native = answers(case, NativeDenoiser(network, params, scales, CpuKernels(), "cpu"))
    simulated, exact = answers(case, SimDenoiser(network, params, scales)), answers(case, case.float_denoiser())
    exact = [exact[case.timesteps.index(t)] for t in scales.rows.t]
    found = [
        apart([a[i : i + 1]], [b[i : i + 1]], [c[i : i + 1]])
        for a, b, c in zip(native, simulated, exact, strict=True)
        for i in range(len(a))
    ]
    assert min(found) < 1e-5


def test_the_modulated_file_is_the_simulation(case):
    scales, context = all_modulated(case), case.trajectories.context.of(range(IMAGES))
    model = build_onnx(case.network, case.checkpoint, scales, "fp32", "0" * 64)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = len(next(iter(context.values())))
    for error, lockstep in passes(case, scales, session, range(3), batch=images, context=context):
        assert error < 1e-4 and lockstep.from_edge < 1e-2


def test_an_image_does_not_depend_on_the_others(case):
    """And not on their prompts: each has a line of its own."""
    scales = case.scales()
    native = NativeDenoiser(case.network, case.checkpoint.params, scales, CpuKernels(), "cpu")
    both, alone = case.sample(native, images=2), case.sample(native, images=1)
    assert np.array_equal(both[0], alone[0])
    context = case.trajectories.context
    other = replace(context, positive={k: v[::-1].copy() for k, v in context.positive.items()})
    swapped = replace(case, trajectories=replace(case.trajectories, context=other)).sample(native, images=1)
    assert not np.allclose(swapped, alone, atol=1e-3)
    # What the first image is given is nothing to the second.
    first = replace(context, positive={k: np.stack([v[1], v[1]]) for k, v in context.positive.items()})
    changed = replace(case, trajectories=replace(case.trajectories, context=first)).sample(native, images=2)
    assert np.array_equal(changed[1], both[1]) and not np.allclose(changed[0], both[0], atol=1e-3)


class InFours(NativeDenoiser):
    """Fills batches up to four, as captured graphs do to powers of two."""

    def _padded(self, batch):
        return -(-batch // 4) * 4


def test_guidance_inside_a_pass_is_guidance_around_it(case):
    context, scales = case.trajectories.context, case.scales()
    if context.guidance is None:
        pytest.skip("no guidance")
    parts = (case.network, case.checkpoint.params, scales, CpuKernels(), "cpu")
    around, inside = NativeDenoiser(*parts), InFours(*parts, guidance=context.guidance)
    x, lines = ImageNoise(0, range(3), case.network.config.input_shape).draw(), context.of(range(3))
    expected = guided(around, context)
    expected.reset(3, lines)
    inside.reset(3, lines)
    for row in range(len(scales.rows)):
        found = inside(torch.from_numpy(x), row)
        np.testing.assert_allclose(found, expected(torch.from_numpy(x), row), rtol=1e-5, atol=1e-5)
    alone = [info.nbytes for info in around.state_info]
    for guided_one in (inside, expected):
        assert [info.nbytes for info in guided_one.state_info] == [2 * n for n in alone]
        assert all(info.shape[0] == 2 for info in guided_one.state_info)
    # A whole trajectory on the device, with the solver's update in it; and a smaller batch in the same buffers.
    updates = case.updates()
    stepped = sample_trajectory(expected, updates, x, context=lines)
    whole = sample_trajectory(inside, updates, x, context=lines)
    np.testing.assert_allclose(whole, stepped, rtol=1e-3, atol=1e-3)
    alone = sample_trajectory(inside, updates, x[:1], context=context.of(range(1)))
    np.testing.assert_array_equal(alone, whole[:1])


def test_guidance_is_the_combination_of_two_answers(layout):
    model, network, checkpoint = layout
    positive, negative = (random_context(network, seed=seed) for seed in (5, 6))
    context = Context(*({k: v.numpy() for k, v in side.items()} for side in (positive, negative)), 7.5)
    denoiser = guided(TorchDenoiser(network, checkpoint.params, (40, 500)), context)
    x, _, _ = inputs(network)
    denoiser.reset(IMAGES, context.of(range(IMAGES)))
    t = int(denoiser.rows.t[0])
    with_prompt, without = (answer(model, x, t, side) for side in (positive, negative))
    expected = without + 7.5 * (with_prompt - without)
    assert float((denoiser(x, 0) - expected).abs().max() / expected.abs().max()) < 1e-5
