"""A TensorRT plan driven from PyCUDA: its arrays and its stream go in, its arrays come out, nothing is copied to the host.

    pip install 'modiff-trt[rtx,cuda,pycuda]'
    python examples/4_pycuda.py engines/plans/NAME.plan

PyCUDA must share the primary context, which torch and this backend use (`pycuda.autoprimaryctx`); a context of its own is what
makes PyCUDA clash with other libraries. Not run so far: it needs a GPU that TensorRT supports.
"""

import sys

import numpy as np
import pycuda.autoprimaryctx  # noqa: F401
import pycuda.driver as cuda
from pycuda import gpuarray

import modiff_trt


def main(plan_file: str, images: int = 4) -> None:
    """Samples a batch with the update done by PyCUDA on its own stream."""
    stream = cuda.Stream()
    backend = modiff_trt.denoiser(plan_file, stream=stream.handle)
    denoiser, updates = backend.denoiser, backend.updates(eta=0.0)
    rows = denoiser.rows
    noise = np.random.default_rng(0).standard_normal((images, *backend.config.input_shape), np.float32)
    x = gpuarray.to_gpu_async(noise, stream=stream)
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
