"""Which weights a training checkpoint holds: the raw ones, their exponential moving average (EMA), or both.

Trainers agree on no name. An entry is an EMA if its name has one of the words in EMA_WORDS (`ema`, `model_ema`,
`ema_state_dict`, `state_dict_ema`, `ema_model`, `params_ema`, ...), or is the fifth of DDIM's training list `[model, optimizer,
epoch, step, ema]`; inside one state dict, if its keys begin with such a name (`ema_model.`, `model_ema.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from modiff_trt.core.errors import InputError, shown

State = dict[str, Tensor]

EMA_WORDS = {"ema", "averaged", "shadow"}
# What wrappers put in front of every name: data parallel, torch.compile, Lightning, EMA modules.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "online_model.", "model_ema.", "ema.", "net.", "unet.")
# In which an EMA's module keeps its weights.
INNER = ("module", "shadow", "state_dict", "model", "params")
# Counters of EMA modules, which are no weights.
COUNTERS = {"initted", "step", "decay", "num_updates", "n_averaged", "updates"}
DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")


class Weights(StrEnum):
    """Which weights of a checkpoint: `raw`, as the optimizer left them, or `ema`."""

    RAW = "raw"
    EMA = "ema"


@dataclass(frozen=True)
class WeightSet:
    """One set of weights of a file: where it is found there, and its tensors; None where they have no names."""

    kind: Weights
    place: str
    state: State | None


@dataclass(frozen=True)
class Chosen:
    """The weights that are used, which they are, and where in the file they are; `other` is whether there were others to
    take."""

    state: State
    kind: Weights
    place: str
    other: bool


def choose(content: Any, wanted: Weights | None, source: str) -> Chosen:
    """The weights of a file's content: those that are `wanted`, or else the EMA where there is one. Raises InputError, naming
    what there is, if there is none or it is not clear which."""
    sets = find_weights(content)
    if not sets:
        raise InputError(
            f"{source} holds no state dict; expected a dictionary of tensors, one under a name like 'state_dict' or 'ema', or "
            "DDIM's training list"
        )
    averaged = [found for found in sets if found.kind is Weights.EMA]
    kind = wanted or (Weights.EMA if averaged else Weights.RAW)
    fitting = [found for found in sets if found.kind is kind]
    there = ", ".join(f"{found.kind} weights at {found.place}" for found in sets)
    if not fitting:
        raise InputError(f"{source} has no {kind} weights; it has {there}: leave --weights out")
    if len(fitting) > 1:
        raise InputError(f"{source} has several sets of weights ({there}); save the one that you want into a file of its own")
    (chosen,) = fitting
    if chosen.state is None:
        raise InputError(
            f"{source} has {kind} weights without names at {chosen.place}; save them as a state dict"
            + (", or pass --weights raw" if len(sets) > 1 and kind is Weights.EMA else "")
        )
    return Chosen(without_prefixes(chosen.state), kind, chosen.place, other=len(sets) > 1)


def find_weights(content: Any) -> list[WeightSet]:
    """Every set of weights in what a checkpoint file holds."""
    if isinstance(content, (list, tuple)):
        return _of_list(content)
    if not isinstance(content, Mapping):
        return []
    state = _state_dict(content)
    if state is not None:
        return _of_state(state, "the top level")
    found = []
    for key, value in content.items():
        averaged = isinstance(key, str) and is_ema(key)
        inner = _weights(value) if isinstance(value, Mapping) else None
        if inner is not None:
            sets = _of_state(inner, f"'{shown(key)[1:-1]}'")
            found += [WeightSet(Weights.EMA, s.place, s.state) for s in sets[:1]] if averaged else sets
        elif averaged and _holds_tensors(value):
            found.append(WeightSet(Weights.EMA, f"'{shown(key)[1:-1]}'", None))
    return found


def is_ema(name: str) -> bool:
    """Whether a name says that what it names is an average over training."""
    return bool(EMA_WORDS & set(re.split(r"[^a-z]+", name.lower())))


def without_prefixes(state: State) -> State:
    """The state without counters, and without the prefixes that all of its names have."""
    state = {key: value for key, value in state.items() if key.rsplit(".", 1)[-1] not in COUNTERS or value.numel() != 1}
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _of_list(content: Iterable[Any]) -> list[WeightSet]:
    found = []
    for place, value in enumerate(content):
        state = _state_dict(value) if isinstance(value, Mapping) else None
        if state is not None:
            known = DDIM_LIST[place] if place < len(DDIM_LIST) else "further"
            kind = Weights.EMA if known == "ema" else Weights.RAW
            found.append(WeightSet(kind, f"entry {place + 1} of the training list", state))
    return found


def _of_state(state: State, place: str) -> list[WeightSet]:
    """One set, or two where some of the names begin with an EMA's."""
    parts: dict[str, State] = {}
    for key, value in state.items():
        head = key.split(".", 1)[0]
        if key not in COUNTERS:
            parts.setdefault(head if is_ema(head) else "", {})[key] = value
    raw = parts.pop("", {})
    if not parts or not raw:
        kind = Weights.EMA if parts and not raw else Weights.RAW
        return [WeightSet(kind, place, state)]
    averaged = [WeightSet(Weights.EMA, f"'{head}.*'", _with_dots(part, raw)) for head, part in parts.items()]
    return [*averaged, WeightSet(Weights.RAW, place, raw)]


def _with_dots(averaged: State, raw: State) -> State:
    """An EMA with the raw weights' names: Lightning's EMA module of latent diffusion leaves the dots out of its own."""
    plain = without_prefixes(averaged)
    if any("." in key for key in plain):
        return averaged
    names = {key.replace(".", ""): key for key in without_prefixes(raw)}
    return {names.get(key, key): value for key, value in plain.items()}


def _weights(value: Mapping[Any, Any]) -> State | None:
    """A state dict, or the one inside an EMA's module."""
    state = _state_dict(value)
    if state is not None:
        return state
    inner = [_state_dict(value[name]) for name in INNER if isinstance(value.get(name), Mapping)]
    return inner[0] if len(inner) == 1 else None


def _state_dict(value: Mapping[Any, Any]) -> State | None:
    named = value and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    return {str(k): v for k, v in value.items()} if named else None


def _holds_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(p, Tensor) or (isinstance(p, (list, tuple, Mapping)) and _holds_tensors(p)) for p in parts)
