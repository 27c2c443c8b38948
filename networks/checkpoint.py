"""Reading trained weights: safetensors, and torch files without ever executing what they pickle."""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from modiff_trt.core.errors import InputError, is_out_of_memory, one_line
from modiff_trt.core.files import digest_of, read_file
from modiff_trt.networks.compvis_names import PREFIX, compvis_names, only_unet, with_parts
from modiff_trt.networks.ddim_names import ddim_names
from modiff_trt.networks.foreign import recognize, recognize_content, recognize_path
from modiff_trt.networks.operations import Network
from modiff_trt.networks.weight_sets import State, Weights, choose

KNOWN_MD5 = {
    "1fa350b952534ae442b1d5235cce5cd3": "DDPM CIFAR-10 EMA, model-790000 (the checkpoint of the DDIM and MoDiff papers)",
}
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LISTED = 10
# Of the digest, where the raw weights of a file were taken that has an EMA too.
RAW_SUFFIX = ":raw"


@dataclass(frozen=True)
class Checkpoint:
    """Weights in float32 under the network's parameter names.

    `sha256` is the digest of the bytes that were read, followed by `:raw` where the raw weights were taken from a file that has
    an EMA too: scales of one do not fit the other. `description` is the file's known name. `weights` says which ones these are,
    in words, and `chosen` whether the file left something to choose.
    """

    params: dict[str, Tensor]
    sha256: str
    description: str
    weights: str = "the only weights of the file"
    chosen: bool = False


def load_checkpoint(path: Path, network: Network, weights: str | None = None) -> Checkpoint:
    """Reads the weights of `network`, strictly.

    Takes .safetensors, or .ckpt/.pt/.pth/.bin holding a state dict, dictionaries of them, or DDIM's training list (see
    `weight_sets`). `weights` is `raw` or `ema`; without it the EMA is used where there is one. Raises InputError for anything
    else, for keys or shapes that do not fit (at most ten are listed) and for values that are not finite.
    """
    if weights is not None and weights not in list(Weights):
        raise InputError(f"--weights must be one of {', '.join(Weights)}, found '{weights}'")
    foreign = recognize_path(path)
    if foreign is not None:
        raise InputError(f"checkpoint {path} {foreign}")
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist; pass --ckpt FILE ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise InputError(f"checkpoint {path} has an unknown suffix; expected one of {', '.join(SUFFIXES)}")
    data = read_file(path, "checkpoint")
    content = read_tensors(data, path)
    foreign = recognize_content(content)
    if foreign is not None:
        raise InputError(f"checkpoint {path} {foreign}")
    found = choose(only_unet(content), Weights(weights) if weights is not None else None, f"checkpoint {path}")
    state, names = _named(found.state, network)
    foreign = recognize(state) if not set(names.values()) <= state.keys() else None
    if foreign is not None:
        raise InputError(f"checkpoint {path} does not fit: {foreign}")
    params = fitted(state, network, path, names=names)
    raw_beside_ema = found.kind is Weights.RAW and found.other
    known = "" if path.suffix == ".safetensors" else KNOWN_MD5.get(hashlib.md5(data).hexdigest(), "")
    wrapped = found.other or found.place != "the top level"
    text = f"{found.kind} weights ({found.place})" if wrapped else Checkpoint.weights
    return Checkpoint(params, digest_of(data) + (RAW_SUFFIX if raw_beside_ema else ""), known, weights=text, chosen=wrapped)


def read_tensors(data: bytes, path: Path) -> Any:
    """What a file holds, by its suffix: safetensors, or torch's format, of which nothing is executed. Raises InputError."""
    return _read_safetensors(data, path) if path.suffix == ".safetensors" else _read_torch(data, path)


def fitted(state: State, network: Network, path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's parameters in float32; `names` are those that they have in `state`. Linear layers become 1x1 convolutions.
    Raises InputError for keys and shapes that do not fit, and for values that are not finite."""
    wanted = {names[key]: shape for key, shape in network.parameters.items()}
    _check(state, wanted, path)
    params = {key: _plain(state[names[key]]).reshape(shape) for key, shape in network.parameters.items()}
    for key, value in params.items():
        if not torch.isfinite(value).all():
            raise InputError(
                f"checkpoint {path} has NaN or infinite values in '{names[key]}'; export it again from a sound training run"
            )
    return params


def _named(state: State, network: Network) -> tuple[State, dict[str, str]]:
    """The state, and the names that the network's parameters have in it. The configuration decides them, and never the file: in
    networks of the same shapes DDIM, CompVis and diffusers differ in padding, in epsilon and in the order of sines and cosines,
    and weights of one would answer wrongly as another."""
    a = network.config.architecture
    if a.flip_sin_to_cos:  # as CompVis' YAML files have it, and DDIM's do not
        return with_parts({key.removeprefix(PREFIX): value for key, value in state.items()}, network), compvis_names(network)
    return state, ddim_names(network.parameters, len(a.channels))


def _plain(value: Tensor) -> Tensor:
    return value.detach().resolve_neg().to(torch.float32).contiguous()


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the parameter, or that of a linear layer which is a 1x1 convolution here."""
    return found == shape or (len(shape) == 4 and shape[2:] == (1, 1) and found == shape[:2])


def _read_safetensors(data: bytes, path: Path) -> State:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the reader raises nearly anything for damaged bytes
        if is_out_of_memory(error):
            raise
        raise InputError(f"checkpoint {path} is not a valid safetensors file (truncated?): {one_line(str(error))}") from None


def _read_torch(data: bytes, path: Path) -> Any:
    _check_archive(data, path)
    try:
        # Trainers keep their options beside the weights: a plain holder of values.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"checkpoint {path} cannot be read safely: it is damaged, or holds Python objects, which are never executed; "
            "save its tensors alone (torch.save of a state dict)"
        ) from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        if is_out_of_memory(error) and not isinstance(error, MemoryError):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {path} is damaged or truncated: {first}") from None


def _check_archive(data: bytes, path: Path) -> None:
    """Compares the checksums of a zip archive, which torch does not."""
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise InputError(f"checkpoint {path} is damaged or truncated: {error}") from None
    if damaged is not None:
        raise InputError(f"checkpoint {path} is damaged: the checksum of '{damaged}' in it is wrong; copy or download it again")


def _check(state: State, wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    unusual = {key for key, value in state.items() if not _usual(value)}
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [f"{key} is {state[key].dtype}, {_layout(state[key])}" for key in state if key in unusual]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {shape}"
        for key, shape in wanted.items()
        if key in state and key not in unusual and not _fits(tuple(state[key].shape), shape)
    ]
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "; ".join(problems[:LISTED])
        keys = ", ".join(list(state)[:LISTED]) + (f", ... ({len(state)} in all)" if len(state) > LISTED else "")
        found = f"; it has {keys}" if any(p.startswith(("missing", "unexpected")) for p in problems) else ""
        raise InputError(f"checkpoint {path} does not fit the configuration: {listed}{more}{found}; check --config")


def _usual(value: Tensor) -> bool:
    return value.dtype in DTYPES and value.layout == torch.strided and not value.is_nested and not value.is_meta


def _layout(value: Tensor) -> str:
    return "nested" if value.is_nested else "without values" if value.is_meta else str(value.layout)
