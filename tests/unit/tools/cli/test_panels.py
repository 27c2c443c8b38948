"""Options stand in groups, and every name in a group is an option of some command."""

import inspect
import re

import pytest
from command import run

from modiff_trt.tools.cli.main import STAGES
from modiff_trt.tools.cli.panels import EXAMPLES, PANELS


def test_every_name_in_a_group_is_an_option_and_in_one_group_alone():
    options = {name for stage in STAGES for name in inspect.signature(stage).parameters}
    named = [name for names in PANELS.values() for name in names]
    assert set(named) <= options and len(named) == len(set(named))


def test_help_shows_the_groups(capsys):
    assert run("calibrate", "--help") == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"─ {panel} ") for panel in ("Network", "Inputs", "Output", "Method", "Search")]
    assert places == sorted(places)
    inputs = shown[places[1] : places[2]]
    assert "--trajectories" in inputs and "--rounding" not in inputs


@pytest.mark.parametrize("name", [stage.__name__ for stage in STAGES])
def test_every_command_ends_its_help_with_an_example_of_its_own_options(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"Example: modiff-trt {name} {EXAMPLES[name]}" in shown
    for option in re.findall(r"--[a-z-]+", EXAMPLES[name]):
        assert re.search(rf"{option}\b", shown.split("Example:")[0])
