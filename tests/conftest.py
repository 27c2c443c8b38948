"""Shared fixtures: a tiny network with odd shapes, the shipped demo model, and the full CIFAR-10 model where it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modiff_trt.core.config import Config
from modiff_trt.core.context import NO_CONTEXT, Context
from modiff_trt.core.ddim_yaml import config_from_dict, load_config
from modiff_trt.core.grid import low_zero_point
from modiff_trt.core.scales import Scales
from modiff_trt.core.solvers import Solver
from modiff_trt.export.calibration.ranges import LayerRanges, measure_ranges
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.calibration.trajectories import Trajectories, choose_steps
from modiff_trt.networks.checkpoint import Checkpoint, load_checkpoint
from modiff_trt.networks.ddim_names import ddim_names
from modiff_trt.networks.module import UNet
from modiff_trt.networks.operations import Network
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.cores import usable_cores
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.backends.torch_denoiser import TorchDenoiser
from modiff_trt.runtime.images.noise import ImageNoise
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.tools.evaluation.inception import mend_torchvision

ROOT = Path(__file__).resolve().parents[1]


def full_checkpoint_file() -> Path | None:
    """A trained CIFAR-10 checkpoint for the full-size tests: the environment's, or one in a folder beside the checkout."""
    if "MODIFF_CIFAR10_CKPT" in os.environ:
        return Path(os.environ["MODIFF_CIFAR10_CKPT"])
    return next(iter(sorted(ROOT.parent.glob("*/checkpoints/cifar10*.safetensors"))), None)


# Without a GPU Triton kernels run in its interpreter, which must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


with contextlib.suppress(ImportError):
    mend_torchvision()  # peers import it too
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores, and so do the programs that they run: threads that wait for each other spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, usable_cores()))


@dataclass(frozen=True)
class Case:
    """A network with weights, its float trajectories and the ranges measured on them."""

    network: Network
    checkpoint: Checkpoint
    timesteps: tuple[int, ...]
    trajectories: Trajectories
    ranges: dict[str, LayerRanges]

    def scales(self, **recipe) -> Scales:
        return make_scales(self.network, self.checkpoint, self.trajectories, self.ranges, Recipe(**recipe))

    def sample(self, denoiser, images: int = 4, seed: int = 0) -> np.ndarray:
        x = ImageNoise(seed, range(images), self.network.config.input_shape).draw()
        context = self.trajectories.context
        return sample_trajectory(guided(denoiser, context), self.updates(), x, context=context.of(range(images)))

    def updates(self, eta: float = 0.0):
        return self.trajectories.solver.updates(self.network.config.diffusion, self.timesteps, eta)

    def float_denoiser(self) -> TorchDenoiser:
        return TorchDenoiser(self.network, self.checkpoint.params, self.timesteps)


def make_case(
    network: Network,
    checkpoint: Checkpoint,
    steps: int,
    images: int,
    calib_steps: int,
    solver: Solver | None = None,
    context: Context = NO_CONTEXT,
) -> Case:
    config = network.config
    solver = solver or Solver()
    timesteps = solver.timesteps(config.diffusion, steps)
    chosen, stored = choose_steps(len(timesteps), calib_steps)
    kept = {}
    sample_trajectory(
        guided(TorchDenoiser(network, checkpoint.params, timesteps), context),
        solver.updates(config.diffusion, timesteps),
        ImageNoise(1, range(images), config.input_shape).draw(),
        context=context.of(range(images)),
        on_pass=lambda row, x, eps: kept.__setitem__(row, x.numpy().copy()) if row in stored else None,
    )
    x = np.stack([kept[i] for i in stored])
    trajectories = Trajectories(
        config, checkpoint.sha256, solver, timesteps, 1, np.asarray(stored, np.int64), np.asarray(chosen, np.int64), x, context
    )
    return Case(network, checkpoint, timesteps, trajectories, measure_ranges(network, checkpoint.params, trajectories, images))


def tiny_tree(size: int = 12, ch_mult: tuple[int, ...] = (1, 3), attn: tuple[int, ...] = (6,), **model) -> dict:
    """A DDIM configuration file of a tiny network."""
    return {
        "data": {"image_size": size, "channels": 3},
        "model": {
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": list(ch_mult),
            "num_res_blocks": 1,
            "attn_resolutions": list(attn),
            "resamp_with_conv": True,
            **model,
        },
        "diffusion": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
    }


def tiny_config(*args, **model) -> Config:
    return config_from_dict(tiny_tree(*args, **model), "tiny")


def random_checkpoint(config: Config, seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    module = UNet(config)
    for p in module.parameters():
        if p.ndim == 1:
            p.data.add_(0.1 * torch.randn_like(p))
    return Checkpoint({k: p.detach() for k, p in module.named_parameters()}, f"random-{seed}", "")


def ddim_state(params: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """The parameters as a DDIM checkpoint has them."""
    names = ddim_names(params, levels)
    return {names[key]: value for key, value in params.items()}


def with_low_zero_points(scales: Scales, names: Iterable[str]) -> Scales:
    """The same scales with a low zero point in these layers, whatever their inputs are."""
    changed = {
        name: replace(scales.layers[name], activation_zero_point=low_zero_point(scales.layers[name].act_bits)) for name in names
    }
    return replace(scales, layers=scales.layers | changed)


@pytest.fixture(scope="session")
def tiny() -> Case:
    config = tiny_config()
    return make_case(trace(config), random_checkpoint(config), 6, 3, 6)


@pytest.fixture(scope="session")
def demo() -> Case:
    network = trace(load_config(ROOT / "configs/demo.yml"))
    return make_case(network, load_checkpoint(ROOT / "calib_cache/demo/model.safetensors", network), 20, 6, 10)


@pytest.fixture(scope="session")
def full_checkpoint() -> Path:
    file = full_checkpoint_file()
    if file is None:
        pytest.skip("no trained CIFAR-10 checkpoint; set MODIFF_CIFAR10_CKPT")
    return file
