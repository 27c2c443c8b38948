"""One INT8 convolution on cuDNN's graph API, with its epilogue fused in.

    residual:   out[n,k,p,q] = o_hat[n,k,p,q] + scale[k] * conv(x, weight)[n,k,p,q]
    stateless:  out[n,k,p,q] = bias[k]        + scale[k] * conv(x, weight)[n,k,p,q]

`conv` accumulates INT8 x INT8 in INT32; the epilogue is computed in FP32 and rounded once to the output dtype.
`out` may be the very memory of `o_hat` (see `Int8Conv.run`). Tensors (on the current CUDA device, 16-byte aligned):

    x      int8 [N, C, H, W] channels_last         weight  int8 [K, C, R, R] channels_last
    scale  fp32 [1, K, 1, 1]                       addend  o_hat [N, K, P, Q] channels_last, of out's dtype,
    out    fp16 or fp32 [N, K, P, Q] channels_last         or bias fp32 [1, K, 1, 1]

C and K are multiples of 16 for the fast engines; the caller pads.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass
from typing import Any

import cudnn
import torch

from modiff_trt.plugins.modulated_conv.libraries.timing import graph_time_us

_CUDNN_DTYPE = {torch.float16: cudnn.data_type.HALF, torch.float32: cudnn.data_type.FLOAT}
_X, _WEIGHT, _SCALE, _ADDEND, _OUT = 1, 2, 3, 4, 5  # tensor uids; a serialized graph keeps them
_NAMED = re.compile(r"(eng\d+)_k")  # a plan of cuDNN's own: the engine, with its knobs
PLAN_ERRORS = (RuntimeError, cudnn.cudnnGraphNotSupportedError)  # what an unsupported plan raises


@dataclass(frozen=True)
class ConvSpec:
    """Shape and output dtype of one convolution; `padding` is (top, left, bottom, right)."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dtype: torch.dtype = torch.float16
    residual: bool = True

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N, K, P, Q]."""
        p = (self.height + self.padding[0] + self.padding[2] - self.kernel) // self.stride + 1
        q = (self.width + self.padding[1] + self.padding[3] - self.kernel) // self.stride + 1
        return self.batch, self.out_channels, p, q


IN_PLACE_TRIES = 50


@dataclass
class PlanResult:
    """Outcome of building and timing one candidate plan; `error` is empty when the plan is usable."""

    name: str
    build_s: float = 0.0
    time_us: float = float("inf")
    error: str = ""


@functools.cache
def cudnn_handle(device_index: int) -> Any:
    """The process's cuDNN handle of one device (which must be the current one): an int, from cudnn-frontend 1.28 on an object,
    which only cuDNN's own functions take."""
    return cudnn.create_handle()


def build_graph(spec: ConvSpec, **context: object) -> cudnn.pygraph:
    """The operation graph of `spec`, lowered but without plans; `context` is handle= or device_property=."""
    n, k, p, q = spec.out_shape
    c, h, w, r = spec.in_channels, spec.height, spec.width, spec.kernel
    top, left, bottom, right = spec.padding
    int8, int32, fp32 = cudnn.data_type.INT8, cudnn.data_type.INT32, cudnn.data_type.FLOAT
    out_dtype = _CUDNN_DTYPE[spec.dtype]
    graph = cudnn.pygraph(io_data_type=int8, intermediate_data_type=fp32, compute_data_type=fp32, **context)

    def tensor(uid: int, dims: list[int], dtype: cudnn.data_type) -> cudnn.tensor:
        channels, row = dims[1], dims[1] * dims[3]
        return graph.tensor(dim=dims, stride=[dims[2] * row, 1, row, channels], data_type=dtype, uid=uid)

    x, weight = tensor(_X, [n, c, h, w], int8), tensor(_WEIGHT, [k, c, r, r], int8)
    scale = tensor(_SCALE, [1, k, 1, 1], fp32)
    addend = tensor(_ADDEND, [n, k, p, q], out_dtype) if spec.residual else tensor(_ADDEND, [1, k, 1, 1], fp32)
    acc = graph.conv_fprop(
        image=x,
        weight=weight,
        pre_padding=[top, left],
        post_padding=[bottom, right],
        stride=[spec.stride] * 2,
        dilation=[1, 1],
        compute_data_type=int32,
    )
    acc.set_data_type(int32)
    scaled = graph.mul(a=acc, b=scale, compute_data_type=fp32)
    scaled.set_data_type(fp32)
    out = graph.add(a=scaled, b=addend, compute_data_type=fp32)
    out.set_output(True).set_data_type(out_dtype).set_uid(_OUT)
    out.set_dim([n, k, p, q]).set_stride([p * q * k, 1, q * k, k])
    graph.validate()
    graph.build_operation_graph()
    return graph


def add_heuristic_plans(graph: cudnn.pygraph) -> list[list[int]]:
    """Append cuDNN's own suggestions and return the indices of those whose knobs are named (the others repeat them), those of
    one engine together, in cuDNN's order, which expects the fastest first."""
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B, cudnn.heur_mode.FALLBACK])
    names = [graph.get_plan_name_at_index(index) for index in range(graph.get_execution_plan_count())]
    engines: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if (named := _NAMED.match(name)) and name not in names[:index]:
            engines.setdefault(named[1], []).append(index)
    return list(engines.values())


class Int8Conv:
    """A convolution bound to one plan. Construction allocates scratch tensors and synchronizes; `run` does neither."""

    def __init__(self, spec: ConvSpec, blob: bytes | None = None) -> None:
        """Keep the fastest of cuDNN's suggestions, unless a serialized `blob` is given."""
        self.spec = spec
        self.results: list[PlanResult] = []
        self._handle = cudnn_handle(torch.cuda.current_device())
        if blob is not None:
            self._graph = cudnn.pygraph()
            self._graph.deserialize(self._handle, list(blob))
            self.results.append(PlanResult("deserialized", time_us=self._measure(self._graph.get_workspace_size())))
        else:
            self._graph = build_graph(spec, handle=self._handle)
            # A plan is compiled before it is timed, half a second each. On an H200 the engines after the first were a third of
            # that time and the fastest for none of 177 shapes.
            if not any(self._select(indices) for indices in add_heuristic_plans(self._graph)):
                raise RuntimeError(f"cuDNN has no working plan for {spec}: {[result.error for result in self.results]}")
        self.plan = min(self.results, key=lambda result: result.time_us)
        self.workspace_size: int = self._graph.get_workspace_size()

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        addend: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """Enqueue on torch's current stream; `workspace` has at least `workspace_size` bytes. Legal under capture.

        The launch just before must not write `addend`, unless it is one that all later ones wait for: cuDNN 9.19 has been seen
        to read it before that launch has ended (docs/lab/kernels.md, "A product that began too early").
        """
        cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = {_X: x, _WEIGHT: weight, _SCALE: scale, _ADDEND: addend, _OUT: out}
        self._graph.execute(tensors, workspace, handle=self._handle)

    def serialize(self) -> bytes:
        """The graph with its chosen, compiled plan (about 200 KB), for the same GPU model and cuDNN version."""
        return bytes(self._graph.serialize())

    def _select(self, indices: list[int]) -> bool:
        """Build and time the plans at `indices` and make the fastest the graph's current plan. False if none works."""
        best_us, best_index = float("inf"), -1
        for index in indices:
            self.results.append(result := PlanResult(self._graph.get_plan_name_at_index(index)))
            try:
                start = time.perf_counter()
                self._graph.build_plan_at_index(index)  # also makes it the current plan
                result.build_s = time.perf_counter() - start
                result.time_us = self._measure(self._graph.get_workspace_size_plan_at_index(index))
            except torch.OutOfMemoryError:
                raise
            except PLAN_ERRORS as error:
                result.error = f"{type(error).__name__}: {error}"
            if result.time_us < best_us:
                best_us, best_index = result.time_us, index
        if best_index >= 0:
            self._graph.build_plan_at_index(best_index)  # already built: only selects it
        return best_index >= 0

    def _measure(self, workspace_size: int, inner: int = 10, repeats: int = 7) -> float:
        """Median microseconds per run of the current plan; raises if it leaves output unwritten or is wrong in place."""
        x, weight, scale, addend, out = scratch_tensors(self.spec)
        workspace = torch.empty(max(workspace_size, 1), dtype=torch.uint8, device="cuda")
        self.run(x, weight, scale, addend, out, workspace)
        if not torch.isfinite(out).all():
            raise RuntimeError("the plan left output elements unwritten")
        if self.spec.residual:
            # Many times: a plan whose blocks read what others have written is wrong in some runs only.
            wrong = torch.zeros((), dtype=torch.bool, device="cuda")
            for _ in range(IN_PLACE_TRIES):
                self.run(x, weight, scale, in_place := addend.clone(), in_place, workspace)
                wrong |= (in_place != out).any()
            if wrong:
                raise RuntimeError("the plan is wrong in place")
        return graph_time_us([functools.partial(self.run, x, weight, scale, addend, out, workspace)] * inner, repeats)


def scratch_tensors(spec: ConvSpec) -> tuple[torch.Tensor, ...]:
    """Random (x, weight, scale, addend) and a NaN-filled out, laid out as `Int8Conv.run` takes them."""
    n, k, p, q = spec.out_shape

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)

    x = empty(n, spec.in_channels, spec.height, spec.width, dtype=torch.int8).random_(-127, 128)
    weight = empty(k, spec.in_channels, spec.kernel, spec.kernel, dtype=torch.int8).random_(-127, 128)
    scale = torch.rand(1, k, 1, 1, device="cuda") * 1e-4
    out = empty(n, k, p, q, dtype=spec.dtype).fill_(float("nan"))
    return x, weight, scale, torch.randn_like(out if spec.residual else scale), out
