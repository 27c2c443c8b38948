from dataclasses import replace

import numpy as np
import pytest

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import load_arrays, save_arrays
from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import SCHEMA, load_scales, save_scales
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser


def test_grids_move_where_they_are_static_and_a_recipe_has_dither(tiny, tmp_path):
    scales = tiny.scales()
    assert scales.moving_grids and not scales.without_modulation().moving_grids
    assert not tiny.scales(dither=False).moving_grids
    assert not tiny.scales(method="qdiff").moving_grids
    assert not tiny.scales(granularity="tensor").moving_grids
    file = tmp_path / "s.safetensors"
    save_scales(file, scales)
    assert load_scales(file, tiny.network).moving_grids
    stored = load_arrays(file, "scales", SCHEMA)
    none = {n: layer | {"activation_zero_point": 0} for n, layer in stored.header["layers"].items()}
    save_arrays(file, stored.header | {"granularity": "tensor", "layers": none}, stored.arrays)
    with pytest.raises(InputError, match="moving grids that are not static"):
        load_scales(file, tiny.network)
    save_arrays(file, stored.header | {"moving_grids": 1}, stored.arrays)
    with pytest.raises(InputError, match="moving_grids"):
        load_scales(file, tiny.network)
    save_arrays(file, {k: v for k, v in stored.header.items() if k != "moving_grids"} | {"schema": 8}, stored.arrays)
    assert not load_scales(file, tiny.network).moving_grids  # as files of schema 8 were calibrated


def in_float_or_with_state(scales):
    """The same with every layer that has no state in float."""
    layers = {n: layer if layer.mode == "modiff" else replace(layer, mode=Mode.FLOAT) for n, layer in scales.layers.items()}
    return replace(scales, layers=layers)


def test_moving_grids_change_images_of_layers_without_state_alone(tiny):
    def images(scales):
        return tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, scales))

    for method, changes in (("qdiff", True), ("modiff", False)):
        scales = tiny.scales(method=method)
        scales = replace(scales, moving_grids=True) if changes else in_float_or_with_state(scales)
        assert np.array_equal(images(scales), images(replace(scales, moving_grids=False))) != changes
