"""How many cores this process may use, and how many of them others leave to it. No torch.

Threads that meet at a barrier spin for each other. Two of them on one free core spend a slice of the scheduler's time at every
barrier, which makes a pass of hundreds of small operations tens of times slower: one thread too few costs less.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

# /proc/stat counts in hundredths of a second.
WINDOW = 0.1
# A core counts as free from this share of it on.
FREE = 0.7
PROC = Path("/proc")


def usable_cores() -> int:
    """Cores that the scheduler's affinity and the limits of this process' control groups leave, at least 1."""
    return max(1, int(min(len(_allowed()), cgroup_cores())))


def cgroup_cores(proc: Path = PROC / "self") -> float:
    """The smallest CPU quota, in cores, of this process' control group and of those above it, version 1 or 2; infinity without
    one."""
    limit = math.inf
    for folder, top, files in _groups(proc):
        while True:
            limit = min(limit, _quota([folder / name for name in files]))
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent
    return limit


def _groups(proc: Path) -> list[tuple[Path, Path, tuple[str, ...]]]:
    """(folder of the group, where its hierarchy is mounted, the files of its CPU quota) for every hierarchy."""
    found = []
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return []
    for fields in mounts:
        if "-" not in fields[5:-2]:
            continue
        root, top, after = fields[3], Path(fields[4]), fields[fields.index("-", 5) + 1 :]
        if after[0] == "cgroup2":
            mine = [g[2] for g in groups if g[:2] == ["0", ""]]
            files: tuple[str, ...] = ("cpu.max",)
        elif after[0] == "cgroup" and "cpu" in after[-1].split(","):
            mine, files = [g[2] for g in groups if "cpu" in g[1].split(",")], ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        if mine:  # in a container the mount may begin at the group itself
            inside = os.path.relpath(mine[0], root) if mine[0].startswith(root) else "."
            found.append((top if inside.startswith("..") else top / inside, top, files))
    return found


def _quota(files: list[Path]) -> float:
    try:
        quota, period, *_ = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # the topmost group has no such file
        return math.inf


def _allowed() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class _Counters:
    """Seconds: of the clock, idle ones of the allowed cores together, all of them counted, and those of this process."""

    clock: float
    idle: float
    counted: float
    own: float


class FreeCores:
    """Follows how many of the usable cores other processes leave free."""

    def __init__(self, most: int) -> None:
        """`most` is what is never exceeded."""
        self._allowed = _allowed()
        self._most = max(1, min(most, usable_cores()))
        self._last = self._read()
        self.count = self._most

    def update(self) -> int:
        """The number of cores to use now, at least 1. It changes at most every WINDOW seconds."""
        if self._most == 1 or time.monotonic() - self._last.clock < WINDOW:
            return self.count
        before, self._last = self._last, self._read()
        seconds = self._last.clock - before.clock
        if self._last.counted > before.counted:
            busy = len(self._allowed) - (self._last.idle - before.idle + self._last.own - before.own) / seconds
            free = len(self._allowed) - max(0.0, busy)
            self.count = min(self._most, max(1, int(free + 1 - FREE)))
        return self.count

    def _read(self) -> _Counters:
        idle = counted = 0
        try:
            for line in (PROC / "stat").read_text().splitlines():
                name, *rest = line.split()
                if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in self._allowed:
                    ticks = [int(value) for value in rest[:8]]
                    idle, counted = idle + ticks[3] + ticks[4], counted + sum(ticks)
        except (OSError, ValueError, IndexError):
            counted = 0  # not known: the number stays as it is
        hertz = os.sysconf("SC_CLK_TCK")
        return _Counters(time.monotonic(), idle / hertz, counted / hertz, own=time.process_time())
