"""A folder that `quantize` wrote, called as a diffusers pipeline is. It runs on onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modiff_trt.core.context import from_noise_to_pictures
from modiff_trt.core.errors import InputError
from modiff_trt.core.solvers import solver_from_dict
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.registry.exported import onnx_backend
from modiff_trt.runtime.images.folders import to_uint8
from modiff_trt.runtime.sampler import sample_trajectory
from modiff_trt.runtime.sampling import Backend

NETWORK = "network.onnx"


@dataclass(frozen=True)
class Pictures:
    """`images` of a call: PIL images, or an array float32 [N, H, W, C] in 0..1."""

    images: Any


class ModiffPipeline:
    """Makes images: `ModiffPipeline.from_pretrained(DIR)(batch_size=4, generator=g).images`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> ModiffPipeline:
        """The network in a folder of `modiff-trt quantize`. `device` is cpu or cuda, of onnxruntime. Raises InputError."""
        model = load_onnx(Path(folder) / NETWORK, device)
        if not from_noise_to_pictures(model.config):
            raise InputError(f"{folder} is of a network with a context, or of latents; put a ModiffUNet into a pipeline")
        rows = model.calibrated_rows
        if rows is None:
            raise InputError(f"{Path(folder) / NETWORK} is not quantized; write the folder with `modiff-trt quantize`")
        solver = solver_from_dict(model.manifest["solver"], str(folder))
        return cls(onnx_backend(model, rows.timesteps, solver, device))

    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
    ) -> Pictures:
        """`batch_size` images. `generator` is torch's or numpy's, of x_T and of each step's noise where `eta` is not 0; without
        one they are new at every call. `output_type` is pil or np. Raises InputError for steps that the folder was not made
        for."""
        backend = self._backend
        steps = len(backend.denoiser.rows.timesteps)
        if num_inference_steps not in (None, steps):
            raise InputError(f"this folder was made for num_inference_steps={steps}; quantize again for {num_inference_steps}")
        if output_type not in ("pil", "np"):
            raise InputError(f"output_type must be pil or np, found '{output_type}'")
        if batch_size < 1:
            raise InputError("batch_size must be at least 1")
        shape = (batch_size, *backend.config.input_shape)

        def draw() -> np.ndarray[Any, Any]:
            if generator is None or isinstance(generator, np.random.Generator):
                return (generator or np.random.default_rng()).standard_normal(shape, np.float32)
            import torch

            return torch.randn(shape, generator=generator, device=generator.device).cpu().numpy()

        made = sample_trajectory(backend.denoiser, backend.updates(eta), draw(), draw_noise=draw)
        if output_type == "np":
            return Pictures((made.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1))
        arrays = to_uint8(made)
        return Pictures([Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays])
