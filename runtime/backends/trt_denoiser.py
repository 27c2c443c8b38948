"""The `trt` backend: a TensorRT or TensorRT-RTX plan with its state on the device, one captured graph a step. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from modiff_trt.core.context import PROMPT, Arrays, checked, context_arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.rows import RowTable, plain_rows
from modiff_trt.plugins.cuda.memory import DeviceArray, Graph, Stream, use_device
from modiff_trt.plugins.modulated_conv.tensorrt import plugin as trt_plugin
from modiff_trt.plugins.modulated_conv.tensorrt.library import Library, check_runtime, is_installed, open_library
from modiff_trt.runtime.backends.plan import Plan
from modiff_trt.runtime.denoiser import StateInfo

STATES = ("a_hat.", "o_hat.")


class TrtDenoiser:
    """Runs a plan. With the plugin each state array is one buffer, updated in place; without it two sets of buffers take
    turns, and so do two graphs.

    x may be numpy, or any object with `__cuda_array_interface__` (PyCUDA, CuPy, torch): then eps is a device array too, and
    valid until the next pass. `stream` is the handle of a CUDA stream to work on.
    """

    def __init__(
        self,
        plan: Plan,
        timesteps: tuple[int, ...] | None = None,
        stream: int | None = None,
        *,
        gpu: int = 0,
        runtime: str = "auto",
    ) -> None:
        """`timesteps` is only for float networks; `gpu` is the index of the GPU where no context is current. `runtime` is
        `lean` for stock TensorRT's lean one, which `auto` takes where nothing else can run the plan.

        Raises InputError for a plan that this machine cannot run.
        """
        rows = plan.calibrated_rows
        if rows is None and timesteps is None:
            raise ValueError("a float network needs timesteps")
        self._rows = rows if rows is not None else plain_rows(timesteps or ())
        library = open_library(runtime_of(plan, runtime))
        check_plan(plan, library)
        self._plan, self._library, self._trt = plan, library, library.trt
        name, capability = use_device(gpu)
        check_plan_target(plan, name, capability)
        if plan.manifest["plugin"]:
            trt_plugin.register(library.trt)
        self._engine, self._keep = _deserialize(library, plan)
        self._context = _context(library, self._engine, plan, keep=self._keep)
        self._stream = Stream(stream)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._inputs = {n: self._type(n) for n in names if self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT}
        self._states = [n for n in self._inputs if n.startswith(STATES)]
        self._given = context_arrays(plan.config.architecture)
        self._start = {n: self._on_device(plan.start[n].astype(self._inputs[n])) for n in self._states}
        self._row_scales = self._on_device(np.ascontiguousarray(self._rows.multipliers, np.float32))
        self._stream.synchronize()
        self._batch = self._size = self._turn = 0

    @property
    def rows(self) -> RowTable:
        return self._rows

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        return tuple(StateInfo(n, self._start[n].shape, self._start[n].nbytes) for n in self._states)

    @property
    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of the state after the last pass, by input name."""
        return {n: self._buffers[self._turn][n].to_host(self._stream)[: self._batch] for n in self._states}

    def from_host(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x

    def to_host(self, x: Any) -> np.ndarray[Any, Any]:
        return x if isinstance(x, np.ndarray) else DeviceArray.of(x).to_host(self._stream)

    def reset(self, batch: int, context: Arrays | None = None) -> None:
        """Begins a trajectory. A batch below the profile's smallest runs as that one. Raises InputError for a larger one than
        the plan was built for."""
        least, most = self._plan.batches
        if batch > most:
            raise InputError(
                f"{self._plan.path} was built for batches up to {most}, not {batch}; pass a smaller --batch-size "
                "(with guidance an image counts twice)"
            )
        given = self._padded(context, max(batch, least))
        if max(batch, least) != self._size:
            self._allocate(max(batch, least), given)
        for name, value in given.items():
            self._fixed[name].copy_from(value, self._stream)
        self._stream.synchronize()  # the host's arrays end with this call
        for name in self._states:
            _fill(self._buffers[0][name], self._start[name], self._stream)
        self._batch, self._turn = batch, 0

    def __call__(self, x: Any, row: int) -> Any:
        guest = not isinstance(x, np.ndarray)
        if guest:
            source: Any = DeviceArray.of(x)
        else:
            source = np.zeros(self._fixed["x"].shape, np.float32)
            source[: len(x)] = x
        self._fixed["x"].copy_from(source, self._stream)
        self._set_row(row)
        self._run(self._turn)
        self._turn = (self._turn + 1) % len(self._buffers)
        if guest:
            self._stream.synchronize()  # the guest's own stream knows nothing of this one
            return self._fixed["eps"]
        return self._fixed["eps"].to_host(self._stream)[: self._batch]

    def _set_row(self, row: int) -> None:
        self._fixed["t"].copy_from(self._times.row(row), self._stream)
        if "row_scale" in self._fixed:
            self._fixed["row_scale"].copy_from(self._row_scales.row(row), self._stream)

    def _run(self, turn: int) -> None:
        if self._graphs:
            self._graphs[turn].launch()
        else:
            self._bind(turn)
            self._enqueue()

    def _type(self, name: str) -> Any:
        return np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def _on_device(self, array: np.ndarray[Any, Any]) -> DeviceArray:
        result = DeviceArray(array.shape, array.dtype)
        result.copy_from(np.ascontiguousarray(array), self._stream)
        self._stream.synchronize()
        return result

    def _padded(self, context: Arrays | None, size: int) -> dict[str, np.ndarray[Any, Any]]:
        """What the network is conditioned on, for `size` images: those beyond the batch are given what its last one is."""
        if not self._given:
            return {}
        found = {}
        for name, lines in checked(context).items():
            if name == PROMPT and lines.shape[1] != self._plan.tokens:
                raise InputError(
                    f"{self._plan.path} was built for prompts of {self._plan.tokens} tokens, not {lines.shape[1]}; pad them, "
                    f"or build with --tokens {lines.shape[1]}"
                )
            missing = np.repeat(lines[-1:], size - len(lines), axis=0)
            found[name] = np.ascontiguousarray(np.concatenate([lines, missing]), self._inputs[name])
        return found

    def _allocate(self, size: int, given: dict[str, np.ndarray[Any, Any]]) -> None:
        self._stream.synchronize()
        # The old buffers go before the new ones come; and what fails below must not pass for done.
        self._size, self._graphs, self._buffers, self._fixed = 0, [], [], {}
        image = (size, *self._plan.config.input_shape)
        self._fixed = {"x": DeviceArray(image, np.float32), "eps": DeviceArray(image, np.float32)}
        self._fixed["t"] = DeviceArray((size,), np.int64)
        self._fixed |= {name: DeviceArray(value.shape, value.dtype) for name, value in given.items()}
        if "row_scale" in self._inputs:
            self._fixed["row_scale"] = DeviceArray(self._row_scales.shape[1:], np.float32)
        self._times = self._on_device(np.repeat(self._rows.t[:, None], size, axis=1))
        sets = 1 if self._plan.manifest["plugin"] or not self._states else 2
        for _ in range(sets):
            self._buffers.append({n: DeviceArray((size, *self._start[n].shape), self._inputs[n]) for n in self._states})
        for name in self._inputs:
            shape = self._fixed[name].shape if name in self._fixed else self._buffers[0][name].shape
            if not self._context.set_input_shape(name, shape):
                raise self._failed(f"refuses the shape {shape} for its input {name}")
        for array in (self._fixed["x"], *(self._fixed[name] for name in given), *self._buffers[0].values()):
            array.zero(self._stream)
        self._set_row(0)
        graphs = []
        for turn in range(sets):
            self._bind(turn)
            self._enqueue()  # what TensorRT prepares on a first run must not be captured
            self._stream.synchronize()
            if not self._library.is_rtx or self._context.is_stream_capturable(self._stream.handle):
                graphs.append(Graph(self._enqueue, self._stream))
        self._size, self._graphs = size, graphs if len(graphs) == sets else []

    def _bind(self, turn: int) -> None:
        """Points the engine at one set of buffers to read and the other, or the same, to write."""
        source, target = self._buffers[turn], self._buffers[(turn + 1) % len(self._buffers)]
        addresses = {name: array.pointer for name, array in (self._fixed | source).items()}
        for name in self._states:
            kind, layer = name.split(".", 1)
            addresses[f"{kind}_out.{layer}"] = target[name].pointer
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._failed(f"refuses a buffer for {name}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._failed("failed to run")

    def _failed(self, what: str) -> InputError:
        """The plan `what`, with TensorRT's last word on it."""
        return InputError(f"{self._plan.path} {what}{_said(self._keep)}")


def _fill(target: DeviceArray, image: DeviceArray, stream: Stream) -> None:
    """Copies one image's start to every image of a batch, in doubling steps."""
    batch = target.shape[0]
    target.row(0).copy_from(image, stream)
    done = 1
    while done < batch:
        count = min(done, batch - done)
        part = DeviceArray((count, *image.shape), image.dtype, target, pointer=target.row(done).pointer)
        part.copy_from(DeviceArray(part.shape, image.dtype, target, pointer=target.pointer), stream)
        done += count


def runtime_of(plan: Plan, runtime: str) -> str:
    """Which TensorRT is to run a plan, by what `--runtime` says. Raises InputError where that one cannot."""
    check_runtime(runtime)
    built, compatible = plan.manifest["runtime"], plan.manifest["options"]["version_compatible"]
    if runtime == "auto":
        lean = built == "tensorrt" and compatible and not is_installed("tensorrt") and is_installed("lean")
        return "lean" if lean else built
    if runtime == "lean" and built == "tensorrt":
        if not compatible:
            raise InputError(f"{plan.path} is not for the lean runtime; build it with --version-compatible")
        return runtime
    if runtime != built:
        raise InputError(f"{plan.path} was built by {built}, which --runtime {runtime} cannot run; leave --runtime out")
    return runtime


def check_plan(plan: Plan, library: Library) -> None:
    """Raises InputError unless the installed TensorRT can load the plan."""
    built, compatible = plan.manifest["version"], plan.manifest["options"]["version_compatible"]
    if built != library.version and not compatible:
        raise InputError(
            f"{plan.path} was built by {library.name} {built}, and {library.version} is installed here; build it again"
        )


def check_plan_target(plan: Plan, name: str, capability: tuple[int, int]) -> None:
    """Raises InputError unless the plan was built for this GPU's compute capability."""
    here = f"sm{capability[0]}{capability[1]}"
    if plan.manifest["target"] != here:
        raise InputError(
            f"{plan.path} was built for {plan.manifest['target']}, and {name} is {here}; build it with --target {here}"
        )


def _deserialize(library: Library, plan: Plan) -> tuple[Any, Any]:
    """(engine, runtime), of which the second must outlive the first."""
    trt: Any = library.trt

    class Errors(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.lines.append(text)

    logger = Errors()
    runtime = trt.Runtime(logger)
    if plan.manifest.get("options", {}).get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such a plan carries code of the version that built it
    engine = runtime.deserialize_cuda_engine(plan.data)
    if engine is None:
        raise InputError(f"{library.name} cannot load {plan.path}{_said((runtime, logger))}")
    return engine, (runtime, logger)


def _context(library: Library, engine: Any, plan: Plan, keep: Any) -> Any:
    """An execution context whose passes can be captured."""
    trt = library.trt
    if library.is_rtx:
        config = engine.create_runtime_config()
        # Kernels for the shape at hand before the first pass, not behind it; and graphs are ours to capture.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise InputError(f"{plan.path} cannot be run (is the GPU's memory full?){_said(keep)}")
    return context


def _said(keep: Any) -> str:
    """The last error that TensorRT logged."""
    lines = keep[1].lines
    return f": {' '.join(lines[-1].split())[:200]}" if lines else ""
