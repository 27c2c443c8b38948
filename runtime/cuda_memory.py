"""Device memory, streams and captured graphs through cuda-python. No torch.

An array here is a guest everywhere: `__cuda_array_interface__` hands it to PyCUDA, CuPy, Numba or torch without a copy, and
`DeviceArray.of` takes theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from modiff_trt.export.errors import InputError
from modiff_trt.plugins.modulated_conv.device_code import check, current_capability

Array = np.ndarray[Any, Any]


def driver() -> Any:
    """cuda-python's driver module. Raises InputError where it is not installed."""
    try:
        from cuda.bindings import driver as module
    except ImportError:
        raise InputError("the trt backend needs cuda-python; pip install 'modiff-trt[cuda]'") from None
    return module


def use_device(index: int = 0) -> tuple[str, tuple[int, int]]:
    """Makes a GPU's primary context current, which torch and PyCUDA share; returns its name and compute capability."""
    cu = driver()
    try:
        check(cu.cuInit(0))
        device = check(cu.cuDeviceGet(index))
        check(cu.cuCtxSetCurrent(check(cu.cuDevicePrimaryCtxRetain(device))))
        name = check(cu.cuDeviceGetName(128, device)).decode().rstrip("\0")
        major, minor = divmod(current_capability(index), 10)
        return name, (major, minor)
    except (RuntimeError, OSError) as error:  # cuda-python raises its own kinds where the driver library is missing
        raise InputError(f"no NVIDIA GPU can be used here ({' '.join(str(error).split())[:120]})") from None


class Stream:
    """A CUDA stream: a new one, or the handle of somebody else's."""

    def __init__(self, handle: int | None = None) -> None:
        if handle is None:
            cu = driver()
            handle = int(check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        self.handle = handle

    def synchronize(self) -> None:
        check(driver().cuStreamSynchronize(self.handle))


class DeviceArray:
    """Contiguous memory on the current device, 256-byte aligned, freed with the object."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, owner: Any = None, pointer: int = 0) -> None:
        """Allocates, uninitialized; with `owner` it is a view of memory at `pointer` that the owner keeps alive."""
        self.shape, self.dtype, self._owner = tuple(shape), np.dtype(dtype), owner
        self.nbytes = prod(self.shape) * self.dtype.itemsize
        self.pointer = pointer
        if owner is None:
            try:
                self.pointer = int(check(driver().cuMemAlloc(max(self.nbytes, 1))))
            except RuntimeError as error:
                raise InputError(f"{self.nbytes} bytes of GPU memory cannot be had ({error}); use a smaller batch") from None

    def __del__(self) -> None:
        if self._owner is None and self.pointer:
            driver().cuMemFree(self.pointer)

    @classmethod
    def of(cls, guest: Any) -> DeviceArray:
        """A view of any object with `__cuda_array_interface__`. Raises InputError if it is not contiguous."""
        about = guest.__cuda_array_interface__
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
        return DeviceArray(self.shape[1:], self.dtype, self, self.pointer + index * step)

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
        check(cu.cuStreamBeginCapture(stream.handle, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            enqueue()
        finally:
            graph = check(cu.cuStreamEndCapture(stream.handle))
        self._graph = check(cu.cuGraphInstantiate(graph, 0))
        check(cu.cuGraphDestroy(graph))
        self._stream = stream

    def launch(self) -> None:
        check(driver().cuGraphLaunch(self._graph, self._stream.handle))

    def __del__(self) -> None:
        graph = getattr(self, "_graph", None)
        if graph is not None:
            driver().cuGraphExecDestroy(graph)
