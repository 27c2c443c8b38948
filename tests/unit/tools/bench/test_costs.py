"""Costs of modes, measured on this machine's CPU: their form, not their size."""

from math import prod

import pytest
from conftest import make_case, random_checkpoint, tiny_config

from modiff_trt.core.costs import ModeCurve, ModePoint, load_costs
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import read_signed, write_signed
from modiff_trt.core.kinds import Mode
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.tools.bench.costs import INSTANCES, MIXTURES, _kind, _together, groups, measure_costs
from modiff_trt.tools.bench.table import print_bench, print_costs


@pytest.fixture(scope="module")
def small():
    config = tiny_config(size=8, ch_mult=(1, 2), attn=(4,))
    return make_case(trace(config), random_checkpoint(config), 3, 2, 3)


def measured(case, part, make):
    return measure_costs(
        case.network,
        case.scales(),
        lambda: make,
        [1, 2],
        runs=1,
        passes=2,
        device="cpu",
        where="a CPU",
        baselines={2: 123.0},
        part=part,
    )


@pytest.fixture(scope="module")
def content(small, tmp_path_factory):
    """Measured in two goes: the second takes what the first has left."""
    part, made = tmp_path_factory.mktemp("costs") / "costs.json.part", []

    def make(chosen):
        made.append(chosen)
        if len(made) == 6:
            raise KeyboardInterrupt
        return trained.native(small.network, small.checkpoint.params, chosen)

    with pytest.raises(KeyboardInterrupt):
        measured(small, part, make)
    kept = read_signed(part, "costs", "")["differences"]
    assert len(kept) == 3
    found = measured(small, part, make)
    layers = small.scales().layers
    changes = sum(1 + (layers[names[0]].mode == Mode.MODIFF) for names in groups(small.network, small.scales()))
    # Of the second go: the two that others are timed beside, what the first had not measured, all state gone, all layers in
    # float, instances of both, and the mixtures.
    assert len(made) == 6 + 2 + changes - 3 + 2 + 2 * INSTANCES + MIXTURES
    timed = found["batches"]["1"]["differences"]
    beside_stateless = {key for key in timed if key.startswith("without state, ")}
    assert {"instance 0", "without state, instance 0"} < timed.keys()
    # With state nothing but its loss is timed, and without it nothing but float; mixtures are beside the pass with state.
    assert all(":int8" not in key for key in beside_stateless)
    assert sum(":float" in key for key in timed.keys() - beside_stateless) <= MIXTURES
    return found


def test_another_instance_of_the_network_may_be_slower_by_itself(small, tmp_path, monkeypatch):
    """State costs by the images that a layer reads and writes, float twice that, and all instances are 3 us slower than the
    first."""
    scales = small.scales()
    base = {name: layer.mode for name, layer in scales.layers.items()}
    size = {spec.name: 1e-3 * (prod(spec.in_shape) + prod(spec.out_shape)) for spec in small.network.layers}
    made = []

    class Timed:
        def __init__(self, chosen):
            gone = [n for n, layer in chosen.layers.items() if layer.mode != Mode.MODIFF and base[n] == Mode.MODIFF]
            floating = [n for n, layer in chosen.layers.items() if layer.mode == Mode.FLOAT and base[n] == Mode.MODIFF]
            self.time = 100.0 - sum(size[n] for n in gone) + sum(2 * size[n] for n in floating) + (3.0 if made else 0.0)
            made.append(self)

    monkeypatch.setattr("modiff_trt.tools.bench.costs._microseconds", lambda denoiser, *_: denoiser.time)
    monkeypatch.setattr("modiff_trt.tools.bench.costs.whole_intervals", lambda passes, _: passes)
    path = tmp_path / "costs.json"
    write_signed(path, measured(small, tmp_path / "part", Timed))
    costs = load_costs(path, scales.layers, 1)
    for name in scales.modulated:
        assert costs.added[name][Mode.INT8] == pytest.approx(-size[name], abs=0.15)
        assert costs.added[name][Mode.FLOAT] == pytest.approx(size[name], abs=0.25)
    plain = costs.predict(base | dict.fromkeys(scales.modulated, Mode.INT8))
    # What any instance but the first takes.
    assert plain == pytest.approx(103 - sum(size[name] for name in scales.modulated), abs=0.3)


def test_every_layer_is_in_one_group_with_its_likes(small):
    scales = small.scales()
    found = groups(small.network, scales)
    assert sorted(name for names in found for name in names) == sorted(scales.layers)
    for names in found:
        assert len({small.network.layer(name).in_shape for name in names}) == 1
        assert len({scales.layers[name].mode for name in names}) == 1


def test_costs_are_read_back_by_batch_size(small, content, tmp_path):
    path = tmp_path / "costs.json"
    write_signed(path, content)
    scales = small.scales()
    costs = load_costs(path, scales.layers, None)
    assert costs.batch == 2 and costs.baseline == 123.0 and load_costs(path, scales.layers, 1).baseline is None
    base = {name: layer.mode for name, layer in scales.layers.items()}
    assert costs.base == base and costs.predict(base) == costs.whole > 0
    for name, mode in base.items():
        assert set(costs.added[name]) == {Mode.INT8, Mode.FLOAT} - {mode}
    mixtures = content["batches"]["2"]["mixtures"]
    assert len(mixtures) == MIXTURES and len({m["predicted"] for m in mixtures}) == MIXTURES
    count = list(base.values()).count(Mode.FLOAT)
    assert [m["float"] == count for m in mixtures] == [False, True, False, True, False]  # every second one takes state alone
    assert len(content["batches"]["2"]["differences"]) > MIXTURES + INSTANCES
    for mixture in mixtures:
        assert mixture["error"] == pytest.approx(mixture["predicted"] / mixture["measured"] - 1)
        assert mixture["modiff"] + mixture["int8"] + mixture["float"] == len(base)


def test_costs_whose_predictions_are_wrong_are_doubted(small, content, tmp_path, capsys):
    path, layers = tmp_path / "costs.json", small.scales().layers
    entry = content["batches"]["2"]

    def with_error(error):
        mixtures = [entry["mixtures"][0] | {"error": 0.01}, entry["mixtures"][1] | {"error": error}]
        changed = content | {"batches": {"2": entry | {"mixtures": mixtures}}}
        write_signed(path, changed)
        print_costs(changed)
        return load_costs(path, layers, 2).doubt(), " ".join(capsys.readouterr().out.split())

    doubt, said = with_error(-0.33)
    assert "errors of up to 33%" in doubt and doubt in said
    doubt, said = with_error(0.04)
    assert doubt is None and "errors" not in said


def test_a_pass_of_many_changed_layers_is_timed_once():
    flips = [{"a": Mode.FLOAT}, {"b": Mode.FLOAT}, {"c": Mode.INT8}]
    assert _together(flips) == [{"a": Mode.FLOAT, "b": Mode.FLOAT}]  # INT8 of c alone is among them
    assert _together([*flips, {"d": Mode.INT8}]) == [dict.fromkeys("cd", Mode.INT8), dict.fromkeys("ab", Mode.FLOAT)]


def test_a_layer_in_float_may_gain_or_lose_by_all_that_it_does(small):
    """Of its state it can gain no more than state moves."""
    state = {spec.name: Mode.MODIFF for spec in small.network.layers}
    for spec in small.network.layers:
        without, floating = (_kind(small.network, state, {spec.name: mode}) for mode in (Mode.INT8, Mode.FLOAT))
        back = _kind(small.network, state | {spec.name: Mode.FLOAT}, {spec.name: Mode.INT8})
        assert without.loses_state and without.work == -without.modelled > 0
        assert not floating.loses_state and floating.work > abs(floating.modelled)
        assert (back.modelled, back.work, back.loses_state) == (-floating.modelled, floating.work, False)


def test_costs_that_do_not_fit_are_refused(small, content, tmp_path):
    path, layers = tmp_path / "costs.json", small.scales().layers

    def refused(changed, why, batch=None, names=layers):
        write_signed(path, changed)
        with pytest.raises(InputError, match=why):
            load_costs(path, names, batch)

    refused(content, "has batch sizes 1, 2, not 7", batch=7)
    refused(content, "another network", names=["conv_in"])
    refused(content | {"kind": "bench"}, "does not hold costs")
    refused(content | {"batches": {}}, "holds no batch size")
    entry = content["batches"]["2"]
    refused(content | {"batches": {"2": entry | {"whole": -1.0}}}, "incomplete")
    refused(content | {"batches": {"2": entry | {"whole": "fast"}}}, "incomplete")
    refused(content | {"batches": {"2": entry | {"added": {}}}}, "incomplete")
    refused(content | {"batches": [1]}, "incomplete")


def test_a_choice_that_came_slower_than_predicted_is_said(capsys):
    row = {"microseconds": 480.0, "microseconds_an_image": 120.0, "images_a_second": 1.0}
    row |= {"memory_bytes": 0, "state_bytes_an_image": 0}
    result = {"machine": {"processor": "x", "cores": 2}, "batches": {"4": {"native-int8": row, "native-auto": row}}}

    def said(predicted, *, device="2 CPU cores", batch=4):
        points = tuple(ModePoint(3, us, 0, 50.0, passes=1.0) for us in (150.0, predicted))
        print_bench(result, ModeCurve(device, batch, None, points, chosen=1))
        return " ".join(capsys.readouterr().out.split())

    assert "native-auto: the modes were chosen for 100.0 us an image at batch 4 (-17%): others may be faster" in said(100.0)
    assert "(+17%)" in said(140.0)
    # Near enough, or chosen for another device or batch size.
    assert all("others may" not in line for line in (said(116.0), said(100.0, device="an H200"), said(100.0, batch=8)))
