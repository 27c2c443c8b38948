"""The parameter names of DDIM's and DDPM's checkpoints, for the network's own, which are diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable

ENDS = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
TOP = {"time_embedding.linear_1": "temb.dense.0", "time_embedding.linear_2": "temb.dense.1", "conv_norm_out": "norm_out"}
KINDS = {"resnets": "block", "attentions": "attn"}
INSIDE = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ddim_names(parameters: Iterable[str], levels: int) -> dict[str, str]:
    """The network's parameter -> the same in a DDIM checkpoint, of a network of so many levels."""
    return {name: _ddim_name(name, levels) for name in parameters}


def _ddim_name(name: str, levels: int) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    found = INSIDE.fullmatch(module)
    if found:
        side, level, kind, i, rest = found[1], int(found[2]), found[3], found[4], found[5]
        # diffusers counts the levels of the way up from the smallest image.
        level = level if side == "down" else levels - 1 - level
        if kind in KINDS:
            return f"{side}.{level}.{KINDS[kind]}.{i}.{ENDS.get(rest, rest)}.{leaf}"
        return f"{side}.{level}.{kind.removesuffix('rs')}.{rest}.{leaf}"
    found = MIDDLE.fullmatch(module)
    if found:
        kind, i, rest = found[1], int(found[2]) + 1, found[3]
        return f"mid.{KINDS[kind]}_{i}.{ENDS.get(rest, rest)}.{leaf}"
    return name
