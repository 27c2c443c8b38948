import json

import numpy as np
import pytest
import torch
import yaml
from conftest import ddim_state, random_checkpoint, tiny_config, tiny_tree
from safetensors.torch import save_file

from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.tools.research.states import rounded_between
from modiff_trt.tools.research.study import METHODS, SCALE_RECIPES, STARTS, ladder, main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Configuration and checkpoint of a network of one level, as files."""
    folder, config = tmp_path_factory.mktemp("model"), tiny_config(8, (1,), (8,))
    (folder / "tiny.yml").write_text(yaml.safe_dump(tiny_tree(8, (1,), (8,))))
    save_file(ddim_state(random_checkpoint(config).params, 1), folder / "tiny.safetensors")
    return folder / "tiny.yml", folder / "tiny.safetensors"


def run(model, out, parts):
    main(
        config=model[0],
        ckpt=model[1],
        out=out,
        timesteps=3,
        images=1,
        calibration_images=2,
        parts=parts,
        bits="4",
        percentile=None,
        weight_bits="8",
        learned=None,
        iterations=2,
        device="cpu",
        seconds=1e9,
    )
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_part_writes_its_figures_and_a_rerun_keeps_them(model, tmp_path):
    out = tmp_path / "study.json"
    figures = run(model, out, "methods,starts")
    assert set(figures["methods"]) == {f"{name} A4" for name in METHODS}
    assert set(figures["starts"]) == {f"{name} A4" for name in STARTS}
    figures["methods"]["LTQ A4"] = 123.0
    out.write_text(json.dumps(figures))
    again = run(model, out, "methods,rows,scales")
    assert again["methods"]["LTQ A4"] == 123.0 and len(again["rows"]) == 3 and len(again["scales"]) == 2 * len(SCALE_RECIPES)


def test_ladder_ends_at_its_floor(tiny):
    scales = ladder(tiny.scales(dither=False), 2, 0.5)
    multipliers = scales.rows.multipliers
    assert (multipliers[-1] == 1).all() and scales.rows.warmup >= 1
    assert (np.diff(multipliers[: scales.rows.warmup], axis=0) <= 0).all()


def test_types_of_the_state(tiny):
    scales = tiny.scales()
    arguments = (tiny.network, tiny.checkpoint.params, scales, "cpu")
    exact = tiny.sample(SimDenoiser(*arguments))
    same = tiny.sample(SimDenoiser(*arguments, between_passes=rounded_between(a_hat=torch.float32, o_hat=torch.float32)))
    np.testing.assert_array_equal(same, exact)
    errors = [
        float(
            np.abs(
                tiny.sample(SimDenoiser(*arguments, between_passes=rounded_between(a_hat=torch.float32, o_hat=dtype))) - exact
            ).mean()
        )
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert 0 < errors[0] < errors[1]
    anew = tiny.sample(
        SimDenoiser(*arguments, between_passes=rounded_between(a_hat=torch.float32, o_hat=torch.float32, refresh=1))
    )
    assert float(np.abs(anew - exact).mean()) < errors[0]  # o_hat is what a_hat implies, up to float32's rounding
