"""What a command says without a terminal: lines now and then, less, more, and into a file."""

import io
import logging
import sys

import pytest
from command import run

from modiff_trt.core import progress
from modiff_trt.core.progress import duration, progress_bar
from modiff_trt.tools.cli.saying import plainly, said


@pytest.fixture
def slowly(monkeypatch):
    """Time that passes by itself: a second for each look at the clock."""
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "LINE_EVERY", 3.0)


def test_long_stages_print_a_line_now_and_then(slowly, capsys):
    with plainly(), progress_bar() as bar:
        task = bar.add_task("sample", total=100, unit="passes")
        for _ in range(10):
            bar.advance(task, 10)
        for _ in bar.track(iter(range(7)), total=7, description="ranges"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sample: 30 of 100 passes, 10 passes/s, 7 s left"
    assert [line.split(":")[0] for line in lines] == ["sample"] * 3 + ["ranges"] * 2
    assert "100 of 100" not in " ".join(lines)  # what is done is said by the stage


def test_quiet_leaves_results_and_errors(slowly, capsys):
    with plainly(), said(quiet=True, verbose=False, log=None), progress_bar() as bar:
        for _ in bar.track(range(30)):
            pass
        logging.getLogger("modiff_trt.x").info("a remark")
    assert capsys.readouterr().err == ""
    assert run("--quiet", "inspect", "no-such-file") == 2
    assert "no-such-file does not exist" in capsys.readouterr().err
    with plainly():  # and the next command speaks again
        logging.getLogger("modiff_trt.x").info("a remark")
    assert capsys.readouterr().err == "a remark\n"


def test_a_log_has_what_was_said_with_times(slowly, tmp_path, capsys):
    file = tmp_path / "logs/a.log"
    streams = sys.stdout, sys.stderr
    with plainly(), said(quiet=True, verbose=False, log=file), progress_bar() as bar:
        for _ in bar.track(range(5), description="ranges"):
            pass
        sys.stdout.write("\x1b[1mone")
        sys.stdout.write("\x1b[0m line\nand half")
        sys.stderr.write("\r\x1b[2Ka bar\n")
    assert (sys.stdout, sys.stderr) == streams
    text = file.read_text()
    assert "ranges: 3 of 5 it" in text and " one line\n" in text
    assert "a bar" not in text and "\x1b" not in text
    assert all(line[:2] == "20" for line in text.splitlines())
    assert run("--log", file, "inspect", "no-such-file") == 2
    assert "error: scales file no-such-file does not exist" in file.read_text()
    capsys.readouterr()
    assert run("--log", tmp_path / "logs", "inspect", "no-such-file") == 2
    assert run("--quiet", "--verbose", "inspect", "no-such-file") == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (7200, "2.0 h")])
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_stream_stays_what_it_was(tmp_path):
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, plainly():
        patch.setattr(sys, "stdout", stream)
        with said(quiet=False, verbose=True, log=tmp_path / "x.log"):
            sys.stdout.write("text")
            assert not sys.stdout.isatty()
    assert stream.getvalue() == "text"
