"""Which image of one set belongs to which of another: by their names, or by the numbers in their names. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modiff_trt.core.errors import InputError
from modiff_trt.runtime.images.sets import ImageSet


def pair(a: ImageSet, b: ImageSet) -> str:
    """Says how image i of `a` and image i of `b` belong together, which have equally many. Raises InputError where their names
    say that they do not."""
    if a.count == 1:
        return "the only image of each"
    if a.names is not None and b.names is not None:
        if list(a.names) == list(b.names):
            return "by name"
        mine, theirs = numbers(a.names), numbers(b.names)
        if mine is not None and mine == theirs:
            return f"by the number in the name: {a.names[1]} with {b.names[1]}"
        at = next(i for i, (one, other) in enumerate(zip(a.names, b.names, strict=True)) if one != other)
        raise InputError(
            f"the names in {a.path} and {b.path} do not correspond: in order, {a.names[at]} would meet {b.names[at]}; give "
            "both sets the same names, or the same numbers"
        )
    named = a if a.names is not None else b
    if named.names is None:
        return "by their order, because neither set has names"
    counted = numbers(named.names)
    if counted is not None and len(counted[0]) == 1 and counted[-1][0] - counted[0][0] + 1 != named.count:
        raise InputError(
            f"{named.path} has gaps between {named.names[0]} and {named.names[-1]}, and the other set has no names; which "
            "images belong together cannot be told"
        )
    return f"by their order: {named.names[0]} is the first"


def numbers(names: Sequence[str]) -> list[tuple[int, ...]] | None:
    """The numbers in each name that differ from name to name; None if the names differ in anything else, or not at all."""
    split = [re.split(r"([0-9]+)", name) for name in names]
    if len({tuple(parts[::2]) for parts in split}) != 1:
        return None
    columns = list(zip(*([int(part) for part in parts[1::2]] for parts in split), strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    found = list(zip(*varying, strict=True))
    return found if len(set(found)) == len(names) else None
