"""Device memory, streams and captured graphs through cuda-python. No torch.

An array here is a guest everywhere: `__cuda_array_interface__` hands it to PyCUDA, CuPy, Numba or torch without a copy, and
`DeviceArray.of` takes theirs.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from modiff_trt.core.errors import InputError
from modiff_trt.core.extras import install_command
from modiff_trt.plugins.modulated_conv.kernels.device_code import check, current_capability

Array = np.ndarray[Any, Any]


def driver() -> Any:
    """cuda-python's driver module. Raises InputError where it is not installed."""
    try:
        from cuda.bindings import driver as module
    except ImportError:
        raise InputError(f"the trt backend needs cuda-python; {install_command('cuda')}") from None
    return module


def use_device(gpu: int = 0) -> tuple[str, tuple[int, int]]:
    """The GPU of this thread's current context, or the primary context of the GPU with this index (counted round), which torch
    and PyCUDA share; returns the name and compute capability. Raises InputError where there is none."""
    cu = driver()
    try:
        check(cu.cuInit(0))
        index = 0
        if int(check(cu.cuCtxGetCurrent())):
            index = int(check(cu.cuCtxGetDevice()))
        else:
            index = gpu % max(int(check(cu.cuDeviceGetCount())), 1)
            check(cu.cuCtxSetCurrent(check(cu.cuDevicePrimaryCtxRetain(check(cu.cuDeviceGet(index))))))
        name = check(cu.cuDeviceGetName(128, check(cu.cuDeviceGet(index)))).decode().rstrip("\0")
        major, minor = divmod(current_capability(index), 10)
        return name, (major, minor)
    except (InputError, RuntimeError, OSError) as error:  # cuda-python raises its own kinds where the driver library is missing
        raise InputError(f"no NVIDIA GPU can be used here ({textwrap.shorten(str(error), 200, placeholder=' ...')})") from None


class Stream:
    """A CUDA stream: a new one, or the handle of somebody else's. Raises InputError for the default stream, which cannot be
    captured."""

    def __init__(self, handle: int | None = None) -> None:
        cu = driver()
        if handle is None:
            handle = int(check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        if handle in (0, 1, 2):
            raise InputError("a default stream cannot be captured into a graph; pass a stream that you have created")
        self.handle = handle

    def synchronize(self) -> None:
        check(driver().cuStreamSynchronize(self.handle))


class DeviceArray:
    """Contiguous memory on the current device, 256-byte aligned, freed with the object."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, owner: Any = None, pointer: int = 0) -> None:
        """Allocates, uninitialized; with `owner` it is a view of memory at `pointer` that the owner keeps alive."""
        self.pointer, self._owner, self._free = pointer, owner, None
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = prod(self.shape) * self.dtype.itemsize
        if owner is None:
            cu = driver()
            try:
                self.pointer, self._free = int(check(cu.cuMemAlloc(max(self.nbytes, 1)))), cu.cuMemFree
            except InputError as error:
                raise InputError(f"{self.nbytes} bytes of GPU memory cannot be had ({error}); use a smaller batch") from None

    def __del__(self) -> None:
        free = getattr(self, "_free", None)
        if free is not None and not sys.is_finalizing():
            free(self.pointer)

    @classmethod
    def of(cls, guest: Any) -> DeviceArray:
        """A view of any object with `__cuda_array_interface__`, once what its owner enqueued for it has run. Raises InputError
        if it is not contiguous."""
        about = guest.__cuda_array_interface__
        if not isinstance(guest, DeviceArray):
            # The owner's stream where it names one; otherwise everything.
            stream = about.get("stream")
            check(driver().cuStreamSynchronize(stream) if stream else driver().cuCtxSynchronize())
        view = cls(tuple(about["shape"]), about["typestr"], guest, int(about["data"][0]))
        strides = about.get("strides")
        if strides is not None and tuple(strides) != _strides(view.shape, view.dtype.itemsize):
            raise InputError("a device array must be contiguous, in C order")
        return view

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "strides": None, "version": 3}

    def row(self, index: int) -> DeviceArray:
        """A view of one entry of the first axis."""
        step = self.nbytes // self.shape[0]
        return DeviceArray(self.shape[1:], self.dtype, self, pointer=self.pointer + index * step)

    def zero(self, stream: Stream) -> None:
        """Enqueues the filling with zeros."""
        check(driver().cuMemsetD8Async(self.pointer, 0, self.nbytes, stream.handle))

    def copy_from(self, source: Array | DeviceArray, stream: Stream) -> None:
        """Enqueues a copy; a numpy array must stay as it is until the stream is synchronized."""
        cu = driver()
        if isinstance(source, DeviceArray):
            if source.nbytes != self.nbytes or source.dtype != self.dtype:
                raise ValueError(f"{source.shape} {source.dtype} does not fit {self.shape} {self.dtype}")
            check(cu.cuMemcpyDtoDAsync(self.pointer, source.pointer, self.nbytes, stream.handle))
            return
        if source.dtype != self.dtype or source.nbytes != self.nbytes or not source.flags.c_contiguous:
            raise ValueError(f"{source.shape} {source.dtype} does not fit {self.shape} {self.dtype}")
        check(cu.cuMemcpyHtoDAsync(self.pointer, source.ctypes.data, self.nbytes, stream.handle))

    def to_host(self, stream: Stream) -> Array:
        """A copy as numpy, once everything enqueued before has run."""
        result = np.empty(self.shape, self.dtype)
        check(driver().cuMemcpyDtoHAsync(result.ctypes.data, self.pointer, self.nbytes, stream.handle))
        stream.synchronize()
        return result


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * prod(shape[i + 1 :]) for i in range(len(shape)))


class Graph:
    """What `enqueue` put on the stream, captured once and replayed without the host."""

    def __init__(self, enqueue: Callable[[], None], stream: Stream) -> None:
        cu = driver()
        self._destroy = None
        check(cu.cuStreamBeginCapture(stream.handle, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            enqueue()
        except BaseException:
            cu.cuStreamEndCapture(stream.handle)  # what went wrong is told by the exception
            raise
        graph = check(cu.cuStreamEndCapture(stream.handle))
        self._graph = check(cu.cuGraphInstantiate(graph, 0))
        self._destroy = cu.cuGraphExecDestroy
        check(cu.cuGraphDestroy(graph))
        self._stream = stream

    def launch(self) -> None:
        check(driver().cuGraphLaunch(self._graph, self._stream.handle))

    def __del__(self) -> None:
        destroy = getattr(self, "_destroy", None)
        if destroy is not None and not sys.is_finalizing():
            destroy(self._graph)
