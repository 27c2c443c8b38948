"""Cores by affinity, control groups (files laid out as the kernel lays them out) and what other processes leave free."""

import os
import time

import pytest

from modiff_trt.runtime.backends import cores
from modiff_trt.runtime.backends.cores import FreeCores, cgroup_cores, usable_cores


def hierarchy(base, kind, options, group, root="/"):
    """/proc/self with one mounted hierarchy, and the folder it is mounted at."""
    proc, top = base / "proc", base / "sys"
    proc.mkdir()
    (top / group.strip("/")).mkdir(parents=True)
    (proc / "cgroup").write_text(f"0::{group}\n" if kind == "cgroup2" else f"5:cpu,cpuacct:{group}\n1:name=systemd:/x\n")
    mount = f"30 25 0:26 {root} {top} rw,nosuid shared:9 - {kind} {kind} {options}\n"
    (proc / "mountinfo").write_text(f"22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n{mount}")
    return proc, top


def test_version_2_takes_the_smallest_quota_on_the_way_up(tmp_path):
    proc, top = hierarchy(tmp_path, "cgroup2", "rw", "/a/b")
    (top / "a/b/cpu.max").write_text("400000 100000\n")
    (top / "a/cpu.max").write_text("150000 100000\n")
    assert cgroup_cores(proc) == 1.5
    (top / "a/cpu.max").write_text("max 100000\n")
    assert cgroup_cores(proc) == 4


@pytest.mark.parametrize(("root", "group"), [("/", "/docker/1"), ("/docker/1", "/docker/1")])
def test_version_1_also_where_the_mount_begins_at_the_group(tmp_path, root, group):
    proc, top = hierarchy(tmp_path, "cgroup", "rw,cpu,cpuacct", group, root)
    folder = top / group.strip("/") if root == "/" else top
    (folder / "cpu.cfs_quota_us").write_text("300000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cores(proc) == 3
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_cores(proc) == float("inf")


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_cores(tmp_path) == float("inf")


def test_affinity_limits_the_cores():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("others", "left"), [(0.0, 4), (1.0, 3), (2.2, 2), (3.9, 1), (9.0, 1)])
def test_cores_that_others_keep_busy_are_not_counted(tmp_path, monkeypatch, others, left):
    """Ten seconds in which this process used half a core."""

    def stat(seconds, idle):
        per_core = [int(100 * idle / 4)] * 4
        lines = [f"cpu{i} {int(100 * seconds) - ticks} 0 0 {ticks} 0 0 0 0 0 0" for i, ticks in enumerate(per_core)]
        (tmp_path / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "intr 1"]) + "\n")

    monkeypatch.setattr(cores, "PROC", tmp_path)
    monkeypatch.setattr(cores, "_allowed", lambda: frozenset(range(4)))
    monkeypatch.setattr(cores, "cgroup_cores", lambda: 4.0)
    clock, own = [0.0], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: own[0])
    stat(100, 100)
    free = FreeCores(8)
    assert free.count == 4
    clock[0], own[0] = 0.05, 0.01
    assert free.update() == 4  # too soon to say
    clock[0], own[0] = 10.0, 5.0
    stat(110, 100 + max(0.0, 40 - 5 - 10 * others))
    assert free.update() == left
    (tmp_path / "stat").unlink()
    clock[0] = 20.0
    assert free.update() == left  # not known any more
