"""The `onnx` backend: onnxruntime with I/O binding, so that state is never copied through Python. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from modiff_trt.core.config import Config, stored_config
from modiff_trt.core.context import Arrays, checked, context_arrays
from modiff_trt.core.errors import InputError, is_out_of_memory
from modiff_trt.core.manifest import NetworkManifest
from modiff_trt.core.onnx_file import read_onnx
from modiff_trt.core.rows import RowTable, plain_rows, rows_of_manifest
from modiff_trt.core.start_state import start_state
from modiff_trt.runtime.backends.cores import usable_cores
from modiff_trt.runtime.denoiser import StateInfo

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class OnnxModel:
    """A loaded file: its path, session, graph, configuration, manifest and digest; `gpu` is the index of the GPU it is on, if
    any, and `outside` says that its weights lie in a file of their own."""

    path: Path
    session: ort.InferenceSession
    proto: onnx.ModelProto
    config: Config
    manifest: NetworkManifest
    sha256: str
    gpu: int = 0
    outside: bool = False

    @property
    def calibrated_rows(self) -> RowTable | None:
        """The row table that the file was calibrated with; None for a float network, which takes any timesteps."""
        return rows_of_manifest(self.manifest)


def load_onnx(path: Path, device: str = "cpu", threads: int = 0, gpu: int = 0, spinning: bool = True) -> OnnxModel:
    """Opens an exported file, for `threads` threads (0: all cores that this process may use). Without `spinning` they sleep
    between operations: slower alone, and out of the way of other threads of this process.

    Raises InputError if it is missing, damaged, or was not written by this program.
    """
    if device not in PROVIDERS:
        raise InputError(f"--device must be one of {', '.join(PROVIDERS)}, found '{device}'")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise InputError("this onnxruntime has no CUDA support; install onnxruntime-gpu instead, or pass --device cpu")
    data = read_onnx(path)
    # The graph first: it says in one line what is wrong with a file, and where tensors lie that onnxruntime would go and read.
    proto, manifest = data.proto, data.manifest
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if data.weights is not None:
        # The bytes that were checked, and not what the file may be by now.
        if not hasattr(options, "add_external_initializers_from_files_in_memory"):
            raise InputError(f"{path} keeps its weights in a file of their own, for which this onnxruntime is too old")
        options.add_external_initializers_from_files_in_memory(
            [data.weights.name], [data.weights.content], [len(data.weights.content)]
        )
    try:
        placed = [{"device_id": gpu}] if device == "cuda" else None
        session = ort.InferenceSession(data.content, options, providers=[PROVIDERS[device]], provider_options=placed)
    except Exception as error:  # onnxruntime raises bare pybind exceptions of many kinds
        if is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"ONNX file {path} cannot be loaded (truncated or altered?): {first}") from None
    try:
        config = stored_config(manifest["config"], str(path))
        model = OnnxModel(
            path,
            session,
            proto,
            config=config,
            manifest=manifest,
            sha256=data.sha256,
            gpu=gpu,
            outside=data.weights is not None,
        )
        _ = model.calibrated_rows
    except (ValueError, KeyError, TypeError):
        raise InputError(f"ONNX file {path} has a damaged manifest; export again") from None
    return model


class OnnxDenoiser:
    """Runs an exported network. Two sets of state buffers take turns as input and output, without copies."""

    def __init__(self, model: OnnxModel, timesteps: tuple[int, ...] | None = None, device: str = "cpu") -> None:
        """`timesteps` is only for float networks; quantized ones carry the table they were calibrated with."""
        rows = model.calibrated_rows
        if rows is None and timesteps is None:
            raise ValueError("a float network needs timesteps")
        self._rows = rows if rows is not None else plain_rows(timesteps or ())
        self._session = model.session
        self._device, self._gpu = device, model.gpu
        self._shapes = {i.name: tuple(i.shape[1:]) for i in self._session.get_inputs()}
        self._start = start_state(model.proto, model.manifest, self._shapes)
        types = {i.name: i.type for i in self._session.get_inputs()}
        self._state_names = [name for name in self._shapes if name.startswith(("a_hat.", "o_hat."))]
        self._state_dtype = np.float16 if any(types[n] == "tensor(float16)" for n in self._state_names) else np.float32
        self._context = context_arrays(model.config.architecture)
        self._given: dict[str, tuple[int, ...]] = {}
        self._batch = 0
        self._buffers: list[dict[str, ort.OrtValue]] = []
        self._fixed: dict[str, ort.OrtValue] = {}
        self._bindings: list[Any] = []
        self._turn = 0

    @property
    def rows(self) -> RowTable:
        return self._rows

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        size = np.dtype(self._state_dtype).itemsize
        return tuple(StateInfo(n, self._shapes[n], int(np.prod(self._shapes[n])) * size) for n in self._state_names)

    @property
    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of the state after the last pass, by input name."""
        return {name: value.numpy().copy() for name, value in self._buffers[self._turn].items()}

    def from_host(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x

    def to_host(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x

    def reset(self, batch: int, context: Arrays | None = None) -> None:
        given = checked(context) if self._context else {}
        shapes = {name: given[name].shape for name in self._context}
        if batch != self._batch or shapes != self._given:
            self._allocate(batch, shapes)
        for name in self._context:
            self._fixed[name].update_inplace(np.ascontiguousarray(given[name]))
        for name, value in self._buffers[0].items():
            start = self._start[name].astype(self._state_dtype)
            value.update_inplace(np.broadcast_to(start, (batch, *start.shape)).copy())
        self._turn = 0

    def __call__(self, x: np.ndarray[Any, Any], row: int) -> np.ndarray[Any, Any]:
        self._fixed["x"].update_inplace(np.ascontiguousarray(x, np.float32))
        self._fixed["t"].update_inplace(np.full(self._batch, self._rows.t[row], np.int64))
        if "row_scale" in self._fixed:
            self._fixed["row_scale"].update_inplace(np.ascontiguousarray(self._rows.multipliers[row]))
        self._session.run_with_iobinding(self._bindings[self._turn])
        self._turn = 1 - self._turn
        return np.array(self._fixed["eps"].numpy())  # onnxruntime hands out the buffer itself

    def _allocate(self, batch: int, context: dict[str, tuple[int, ...]]) -> None:
        def new(shape: tuple[int, ...], dtype: Any) -> ort.OrtValue:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, self._gpu)

        self._batch = 0  # what fails here must not leave another batch's buffers behind
        image = (batch, *self._shapes["x"])
        self._fixed = {"x": new(image, np.float32), "t": new((batch,), np.int64), "eps": new(image, np.float32)}
        for name, shape in context.items():
            self._fixed[name] = new(shape, np.int64 if self._context[name].integer else np.float32)
        self._given = context
        if "row_scale" in self._shapes:
            self._fixed["row_scale"] = new(self._shapes_full("row_scale"), np.float32)
        self._buffers = [{n: new((batch, *self._shapes[n]), self._state_dtype) for n in self._state_names} for _ in range(2)]
        self._bindings = []
        for turn in range(2):
            binding = self._session.io_binding()
            for name in self._shapes:
                binding.bind_ortvalue_input(name, self._buffers[turn][name] if name in self._state_names else self._fixed[name])
            binding.bind_ortvalue_output("eps", self._fixed["eps"])
            for name in self._state_names:
                kind, layer = name.split(".", 1)
                binding.bind_ortvalue_output(f"{kind}_out.{layer}", self._buffers[1 - turn][name])
            self._bindings.append(binding)
        self._batch = batch

    def _shapes_full(self, name: str) -> tuple[int, ...]:
        return tuple(next(i.shape for i in self._session.get_inputs() if i.name == name))
