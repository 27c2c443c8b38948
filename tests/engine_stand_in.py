"""An engine without a GPU: device memory is host memory, a captured graph a list of calls, and a pass is onnxruntime's.

Nothing of TensorRT is checked by this. What is checked is what the `trt` backend does around an engine: which buffers it binds
when, how state takes turns, what it resets, copies and frees.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Driver:
    """The calls of cuda-python that the backend makes. Memory begins poisoned, and may not be used beyond its end or life."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self):
        self.blocks, self.captured, self.largest = {}, None, 0

    def __getattr__(self, name):
        plain = {"cuInit", "cuStreamSynchronize", "cuCtxSynchronize", "cuGraphDestroy", "cuGraphExecDestroy"}
        if name in plain:
            return lambda *arguments: (0,)
        raise AttributeError(name)

    def cuCtxGetCurrent(self):
        return 0, 1

    def cuCtxGetDevice(self):
        return 0, 0

    def cuDeviceGet(self, index):
        return 0, index

    def cuDeviceGetName(self, length, device):
        return 0, b"Stand-in\0"

    def cuStreamCreate(self, flags):
        return 0, 77

    def cuMemAlloc(self, size):
        block = ctypes.create_string_buffer(b"\x7f" * size, size)
        self.blocks[ctypes.addressof(block)] = block
        self.largest = max(self.largest, sum(len(b) for b in self.blocks.values()))
        return 0, ctypes.addressof(block)

    def cuMemFree(self, pointer):
        del self.blocks[pointer]
        return (0,)

    def inside(self, pointer, size):
        assert any(start <= pointer and pointer + size <= start + len(block) for start, block in self.blocks.items())

    def run(self, call):
        if self.captured is not None:
            self.captured.append(call)
        else:
            call()
        return (0,)

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        self.inside(target, size)
        return self.run(lambda: ctypes.memmove(target, source, size))

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        self.inside(source, size)
        return self.run(lambda: ctypes.memmove(target, source, size))

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        self.inside(target, size)
        self.inside(source, size)
        return self.run(lambda: ctypes.memmove(target, source, size))

    def cuMemsetD8Async(self, target, value, size, stream):
        self.inside(target, size)
        return self.run(lambda: ctypes.memset(target, value, size))

    def cuStreamBeginCapture(self, stream, mode):
        self.captured = []
        return (0,)

    def cuStreamEndCapture(self, stream):
        calls, self.captured = self.captured, None
        return 0, calls

    def cuGraphInstantiate(self, graph, flags):
        return 0, graph

    def cuGraphLaunch(self, graph, stream):
        for call in graph:
            call()
        return (0,)


class Engine:
    """An exported file as an engine and its execution context at once."""

    def __init__(self, path, driver):
        self._session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._driver, self._shapes, self._addresses = driver, {}, {}
        self._inputs, self._outputs = self._session.get_inputs(), self._session.get_outputs()
        self._all = [*self._inputs, *self._outputs]
        self.num_io_tensors = len(self._all)

    def create_execution_context(self):
        return self

    def get_tensor_name(self, index):
        return self._all[index].name

    def get_tensor_mode(self, name):
        return "in" if name in {i.name for i in self._inputs} else "out"

    def get_tensor_dtype(self, name):
        return next(TYPES[t.type] for t in self._all if t.name == name)

    def set_input_shape(self, name, shape):
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        bound = dict(self._addresses)  # as a graph keeps them

        def call():
            feed = {}
            for tensor in self._inputs:
                shape, dtype = self._shapes[tensor.name], np.dtype(TYPES[tensor.type])
                size = int(np.prod(shape)) * dtype.itemsize
                self._driver.inside(bound[tensor.name], size)
                feed[tensor.name] = np.frombuffer(ctypes.string_at(bound[tensor.name], size), dtype).reshape(shape)
            for tensor, value in zip(self._outputs, self._session.run(None, feed), strict=True):
                self._driver.inside(bound[tensor.name], value.nbytes)
                ctypes.memmove(bound[tensor.name], np.ascontiguousarray(value).ctypes.data, value.nbytes)

        self._driver.run(call)
        return True


TRT = SimpleNamespace(
    __name__="stand_in", __version__="1", nptype=lambda dtype: dtype, TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out")
)
