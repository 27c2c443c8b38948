"""The report is one file that needs nothing else, says what it was made from, and refuses what it cannot show."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from modiff_trt.core.files import sha256
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.tools.assets import demo_path
from modiff_trt.tools.cli.main import app
from modiff_trt.tools.report.data import compare
from modiff_trt.tools.report.page import verdict

BENCH = {
    "config": "x.yml",
    "machine": {"processor": "cpu", "cores": 2},
    "batches": {"4": {name: None for name in ("torch-fp32", "native-modiff")}},
    "not_run": {"tensorrt": {"1": "no plan <given>", "4": "no plan <given>"}},
}
for place, name in enumerate(BENCH["batches"]["4"]):
    BENCH["batches"]["4"][name] = {
        "microseconds": 400.0 - 100 * place,
        "microseconds_an_image": 100.0 - 25 * place,
        "images_a_second": 1.0,
        "memory_bytes": 0,
        "state_bytes_an_image": 0,
    }


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.headings, self._open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "img", "input", "path", "use"):
            self._open.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass


def test_the_page_has_its_sections_and_no_address_of_the_network(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    out = tmp_path / "report.html"
    app(["report", "--out", str(out), "--num-samples", "2", "--bench", str(tmp_path / "bench.json")], standalone_mode=False)
    text = out.read_text()
    page = Page()
    page.feed(text)
    assert page.headings[0] == "MoDiff W8A6 against full precision"
    assert {"Step by step", "Where the error comes from", "Speed and memory"} <= set(page.headings)
    assert page.sources and all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"@import|url\(http", text)
    assert "1.33x" in text and "no plan &lt;given&gt;" in text
    assert sha256(demo_path("modiff-w8a6.safetensors")) in text
    found = [float(v) for v in re.findall(r"<b>([\d.]+) dB</b>", text)]
    assert found[1] > found[0] + 10  # MoDiff against Q-Diff
    said = re.search(r'class="lead">(.*?)</p>', text)[1]
    assert f"{found[1]} dB" in said and f"{found[0]} dB" in said and "limit it" in said
    # Every layer is there by name, and what it was made with.
    assert all(f'title="{name}: ' in text for name in ("conv_in", "mid_block.resnets.0.conv1", "conv_out"))
    assert "model.safetensors, 50 ddim steps" in text


def test_what_other_commands_did_not_write_is_refused_before_any_work(tmp_path, capsys):
    from modiff_trt.tools.cli.main import main

    (tmp_path / "x.json").write_text(json.dumps({"batches": {"1": {}}, "sets": {"a": {}}, "report": {}}))
    for option in ("--bench", "--evaluation", "--plan"):
        with pytest.raises(SystemExit) as exit_:
            main(["report", option, str(tmp_path / "x.json"), "--out", str(tmp_path / "r.html")])
        said = "carries no digest" if option == "--plan" else "was not written by the command"
        assert exit_.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(("alone", "said", "helps"), [(20.0, "weights limit", True), (70.0, "activations limit", False)])
def test_the_verdict_names_what_limits_and_what_is_left_to_do(tiny, alone, said, helps):
    scales = tiny.scales()
    found = replace(compare(tiny.network, tiny.checkpoint, scales, images=1, seed=0, device="cpu"), weights_alone=alone)
    words = verdict(found, scales)
    assert said in words and ("--preset exact" in words) == helps
    # Weights that are learned already are not to be learned again.
    layers = {
        name: replace(layer, round_up=np.zeros(1, bool)) if layer.mode != "float" else layer
        for name, layer in scales.layers.items()
    }
    assert "--preset exact" not in verdict(found, replace(scales, layers=layers))


def test_errors_are_those_of_the_trajectories(tiny):
    scales = tiny.scales(act_bits=6, edge_bits=8)
    found = compare(tiny.network, tiny.checkpoint, scales, images=2, seed=0, device="cpu")
    assert [trace.name for trace in found.traces] == ["FP32", "Q-Diff W8A6", "MoDiff W8A6"]
    assert [trace.x.shape for trace in found.traces] == [(len(found.timesteps), 2, *tiny.network.config.input_shape)] * 3
    exact, _, modulated = found.traces
    assert found.eps_error(exact).max() == 0
    by_hand = np.linalg.norm(modulated.eps[3] - exact.eps[3]) / np.linalg.norm(exact.eps[3])
    assert found.eps_error(modulated)[3] == pytest.approx(by_hand, rel=1e-5)
    np.testing.assert_array_equal(exact.samples, tiny.sample(tiny.float_denoiser(), 2))
    alone = tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, scales, act_quant=False), 2)
    assert found.weights_alone == pytest.approx(psnr(alone, exact.samples))
    assert found.weights_alone > found.psnr(modulated) + 1
