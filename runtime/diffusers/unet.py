"""A quantized network that takes the place of `unet` in a diffusers pipeline. diffusers itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from modiff_trt.core.context import context_arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.scales import load_scales
from modiff_trt.networks.diffusers_folder import model_settings
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.runtime.backends.registry.options import check_device, load_model
from modiff_trt.runtime.denoiser import Denoiser

BACKENDS: dict[str, Callable[..., Denoiser]] = {"native": trained.native, "torch-sim": trained.simulated}


class Settings(dict[str, Any]):
    """A folder's settings, also as attributes: what a pipeline asks its network for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ModiffUNet(nn.Module):
    """Called as diffusers' UNet2DModel and UNet2DConditionModel are, step by step in the order of its scales.

    MoDiff state begins at the first timestep of the scales, and with it a call of the pipeline. Guidance is the pipeline's: it
    passes both halves as one batch, and each image of it keeps a state of its own. Raises InputError for a timestep that does
    not follow from the one before, because the residuals were calibrated between the steps of one schedule.
    """

    def __init__(self, denoiser: Denoiser, settings: dict[str, Any], names: tuple[str, ...], device: str) -> None:
        super().__init__()
        self.config = Settings(settings)
        self._denoiser, self._names, self._device = denoiser, names, torch.device(device)
        warmup = denoiser.rows.warmup
        self._steps = tuple(int(t) for t in denoiser.rows.t[warmup:])
        self._next, self._batch = 0, 0
        # Stable Diffusion XL's pipeline looks here for the number of channels.
        inputs = settings.get("projection_class_embeddings_input_dim") or 0
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=inputs))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, scales: str | Path, backend: str = "native", device: str = "cpu"
    ) -> ModiffUNet:
        """The network of a diffusers folder, quantized by a scales file of `calibrate --model` for it.

        `backend` is native (INT8) or torch-sim. Raises InputError for files that do not belong together.
        """
        if backend not in BACKENDS:
            raise InputError(f"the backend must be one of {', '.join(BACKENDS)}, found '{backend}'")
        network, checkpoint = load_model(None, None, model=Path(folder))
        found = load_scales(Path(scales), network, checkpoint.sha256)
        denoiser = BACKENDS[backend](network, checkpoint.params, found, check_device(device))
        return cls(denoiser, model_settings(Path(folder)), tuple(context_arrays(network.config.architecture)), device)

    @property
    def dtype(self) -> torch.dtype:
        """What a pipeline should pass; the network converts as its backend needs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Those that a scheduler must give, in this order."""
        return self._steps

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """What the network answers to `sample` [N, C, H, W]: an object with `sample`, or a tuple of it."""
        given = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels, **(added_cond_kwargs or {})}
        unknown = [name for name, value in (given | more).items() if value is not None and name not in self._names]
        if unknown:
            raise InputError(f"the quantized network does not take {', '.join(unknown)}")
        step = int(timestep)
        x = self._denoiser.from_host(sample.detach().float().cpu().numpy())
        warmup = self._denoiser.rows.warmup
        if step == self._steps[0]:
            self._begin(len(sample), given)
            for row in range(warmup):
                self._denoiser(x, row)
        elif self._next >= len(self._steps) or step != self._steps[self._next] or len(sample) != self._batch:
            raise InputError(
                f"timestep {step} with {len(sample)} images does not follow: the scales are of {len(self._steps)} timesteps "
                f"from {self._steps[0]} to {self._steps[-1]}; pass num_inference_steps={len(self._steps)} and the scheduler "
                "that they were made with"
            )
        answer = self._denoiser(x, warmup + self._next)
        self._next += 1
        found = torch.as_tensor(self._denoiser.to_host(answer)).to(sample)
        return SimpleNamespace(sample=found) if return_dict else (found,)

    def _begin(self, batch: int, given: dict[str, Tensor | None]) -> None:
        context = {}
        for name in self._names:
            value = given.get(name)
            if value is None:
                raise InputError(f"the network needs {name}, which the pipeline does not pass")
            array = value.detach().cpu()
            context[name] = (array.long() if name == "class_labels" else array.float()).numpy()
        self._denoiser.reset(batch, context or None)
        self._next, self._batch = 0, batch
