"""A TensorRT plan driven from PyCUDA: its arrays and its stream go in, its arrays come out, nothing is copied to the host.

    pip install 'modiff-trt[rtx,cuda,pycuda]'
    python examples/4_pycuda.py engines/plans/NAME.plan

PyCUDA must share the primary context, which torch and this backend use (`pycuda.autoprimaryctx`); a context of its own is what
makes PyCUDA clash with other libraries. Not run so far: it needs a GPU that TensorRT supports.
"""

import sys
from pathlib import Path

import numpy as np
import pycuda.autoprimaryctx  # noqa: F401
import pycuda.driver as cuda
from pycuda import gpuarray

from modiff_trt.core.solvers import solver_from_dict
from modiff_trt.runtime.backends.plan import load_plan
from modiff_trt.runtime.backends.trt_denoiser import TrtDenoiser
from modiff_trt.runtime.images.noise import ImageNoise


def main(plan_file: str, images: int = 4) -> None:
    """Samples a batch with the update done by PyCUDA on its own stream."""
    plan, stream = load_plan(Path(plan_file)), cuda.Stream()
    denoiser = TrtDenoiser(plan, stream=stream.handle)
    rows = denoiser.rows
    solver = solver_from_dict(plan.manifest["network"]["solver"], plan_file)
    updates = solver.updates(plan.config.diffusion, rows.timesteps)
    x = gpuarray.to_gpu_async(ImageNoise(0, range(images), plan.config.input_shape).draw().astype(np.float32), stream=stream)
    denoiser.reset(images)
    for row in range(len(rows)):
        eps = denoiser(x, row)  # x is a guest: any object with __cuda_array_interface__
        if row < rows.warmup:
            continue
        ahead, answered = (np.float32(part[row - rows.warmup]) for part in (updates.x, updates.y))
        answer = gpuarray.GPUArray(eps.shape, eps.dtype, gpudata=eps.pointer, base=eps)
        x = x._axpbyz(ahead, answer, answered, gpuarray.empty_like(x), stream=stream)
    stream.synchronize()
    print(x.get().mean(axis=(1, 2, 3)))


if __name__ == "__main__":
    main(sys.argv[1])
