"""Options stand in groups, and every name in a group is an option of some command."""

import inspect

from command import run

from modiff_trt.tools.cli.main import STAGES
from modiff_trt.tools.cli.panels import PANELS


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
