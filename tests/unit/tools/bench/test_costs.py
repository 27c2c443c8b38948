"""Costs of modes, measured on this machine's CPU: their form, not their size."""

import pytest
from conftest import make_case, random_checkpoint, tiny_config

from modiff_trt.core.costs import load_costs
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import read_signed, write_signed
from modiff_trt.core.kinds import Mode
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.registry import trained
from modiff_trt.tools.bench.costs import INSTANCES, MIXTURES, _together, groups, measure_costs
from modiff_trt.tools.bench.table import print_costs


@pytest.fixture(scope="module")
def small():
    config = tiny_config(size=8, ch_mult=(1, 2), attn=(4,))
    return make_case(trace(config), random_checkpoint(config), 3, 2, 3)


def measured(case, part, make):
    return measure_costs(
        case.network,
        case.scales(),
        make,
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
        if len(made) == 5:
            raise KeyboardInterrupt
        return trained.native(small.network, small.checkpoint.params, chosen)

    with pytest.raises(KeyboardInterrupt):
        measured(small, part, make)
    kept = read_signed(part, "costs", "")["differences"]
    assert len(kept) == 3
    found = measured(small, part, make)
    layers = small.scales().layers
    changes = sum(1 + (layers[names[0]].mode == Mode.MODIFF) for names in groups(small.network, small.scales()))
    # Of the second go: the base, what the first had not measured, all state gone (which is all layers in INT8 here), all in
    # float, instances, and the mixtures.
    assert len(made) == 5 + 1 + changes - 3 + 2 + INSTANCES + MIXTURES
    assert len(found["batches"]["1"]["same again"]) == INSTANCES
    assert any(":float" in changed for changed in kept) and any(":int8" in changed for changed in kept)
    return found


def test_another_instance_of_the_network_may_be_slower_by_itself(small, tmp_path, monkeypatch):
    """Layers that take 1 us less without state, in instances that all are 3 us slower than the first one."""
    scales = small.scales()
    base = {name: layer.mode for name, layer in scales.layers.items()}
    made = []

    class Timed:
        def __init__(self, chosen):
            gone = [n for n, layer in chosen.layers.items() if layer.mode == Mode.INT8 and base[n] == Mode.MODIFF]
            floating = [n for n, layer in chosen.layers.items() if layer.mode == Mode.FLOAT and base[n] == Mode.MODIFF]
            self.time = 100.0 - len(gone) + 2.0 * len(floating) + (3.0 if made else 0.0)
            made.append(self)

    monkeypatch.setattr("modiff_trt.tools.bench.costs._microseconds", lambda denoiser, *_: denoiser.time)
    monkeypatch.setattr("modiff_trt.tools.bench.costs.whole_intervals", lambda passes, _: passes)
    path = tmp_path / "costs.json"
    write_signed(path, measured(small, tmp_path / "part", Timed))
    costs = load_costs(path, scales.layers, 1)
    for name in scales.modulated:
        assert costs.added[name][Mode.INT8] == pytest.approx(-1.0, abs=0.25)
        assert costs.added[name][Mode.FLOAT] == pytest.approx(2.0, abs=0.5)
    plain = costs.predict(base | dict.fromkeys(scales.modulated, Mode.INT8))
    assert plain == pytest.approx(100 - len(scales.modulated), abs=0.2)


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
    state = {"a": Mode.MODIFF, "b": Mode.MODIFF}
    alone = [{"a": Mode.INT8}, {"a": Mode.FLOAT}, {"b": Mode.INT8}, {"b": Mode.FLOAT}]
    gone, floating = dict.fromkeys("ab", Mode.INT8), dict.fromkeys("ab", Mode.FLOAT)
    assert _together(alone, state) == [gone, floating]
    assert _together([*alone, {"c": Mode.INT8}], state | {"c": Mode.FLOAT}) == [gone, gone | {"c": Mode.INT8}, floating]
    assert _together([gone, floating], state) == []


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
