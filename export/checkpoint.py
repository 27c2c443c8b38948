"""Reading trained weights: safetensors, and torch files without ever executing what they pickle."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import md5, sha256
from modiff_trt.export.unet import Network

KNOWN_MD5 = {
    "1fa350b952534ae442b1d5235cce5cd3": "DDPM CIFAR-10 EMA, model-790000 (the checkpoint of the DDIM and MoDiff papers)",
}
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
LISTED = 10


@dataclass(frozen=True)
class Checkpoint:
    """Weights in float32 under the network's parameter names, with the SHA-256 of their file and its known name."""

    params: dict[str, Tensor]
    sha256: str
    description: str


def load_checkpoint(path: Path, network: Network) -> Checkpoint:
    """Reads the weights of `network`, strictly.

    Takes .safetensors, or .ckpt/.pt/.pth holding a state dict, a `{"state_dict": ...}`, or DDIM's training list
    `[model, optimizer, epoch, step, ema]`, of which the EMA is used. Raises InputError for anything else, for keys
    or shapes that do not fit (at most ten are listed) and for values that are not finite.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; pass --ckpt FILE ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise InputError(f"checkpoint {path} has an unknown suffix; expected one of {', '.join(SUFFIXES)}")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = {key.removeprefix("module."): value for key, value in raw.items()}
    if len(state) != len(raw):
        raise InputError(f"checkpoint {path} has some weights twice, with and without 'module.'; keep one of each")
    _check(state, network, path)
    params = {key: state[key].to(torch.float32).contiguous() for key in network.parameters}
    for key, value in params.items():
        if not torch.isfinite(value).all():
            raise InputError(
                f"checkpoint {path} has NaN or infinite values in '{key}'; export it again from a sound training run"
            )
    description = KNOWN_MD5.get(md5(path), "") if path.suffix != ".safetensors" else ""
    return Checkpoint(params, sha256(path), description)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"checkpoint {path} is not a valid safetensors file (truncated?): {error}") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"checkpoint {path} cannot be read safely: it is damaged, or holds Python objects, which are never executed; "
            "save its tensors alone (torch.save of a state dict)"
        ) from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {path} is damaged or truncated: {first}") from None
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, (list, tuple)) and content:
        # [model, optimizer, epoch, step, EMA]; the last is not there with `ema: false`.
        content = content[-1] if isinstance(content[-1], Mapping) else content[0]
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return {str(key): value for key, value in content.items()}
    raise InputError(
        f"checkpoint {path} holds no state dict; expected a dictionary of tensors, {{'state_dict': ...}}, or DDIM's "
        "training list (its EMA, or without one its model)"
    )


def _check(state: Mapping[str, Tensor], network: Network, path: Path) -> None:
    wanted = network.parameters
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {shape}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    problems += [
        f"{key} is {value.dtype}, {value.layout}"
        for key, value in state.items()
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta
    ]
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "; ".join(problems[:LISTED])
        raise InputError(f"checkpoint {path} does not fit the configuration: {listed}{more}; check --config")
