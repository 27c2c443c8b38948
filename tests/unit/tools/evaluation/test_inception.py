"""Inception features equal those of pytorch-fid and torch-fidelity, with random weights: the published ones are a download."""

import numpy as np
import pytest
import torch

from modiff_trt.core.errors import InputError

pytest.importorskip("pytorch_fid")
pytest.importorskip("torchvision")

from modiff_trt.tools.evaluation import inception
from modiff_trt.tools.evaluation.frechet import Moments, frechet_distance


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def test_features_and_distance_are_those_of_pytorch_fid(weights, images, monkeypatch):
    from pytorch_fid import fid_score
    from pytorch_fid import inception as theirs

    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: state)
    reference = theirs.InceptionV3([3]).eval()
    ours = inception.InceptionFeatures(weights)
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        expected = reference(x)[0].flatten(1).numpy()
    found = ours(images)
    np.testing.assert_allclose(found["pool"], expected, rtol=1e-4, atol=1e-4)
    assert found["spatial"].shape == (6, 2023) and found["logits"].shape == (6, 1008)
    assert not ours.published
    moments = [Moments() for _ in range(2)]
    for part, taken in zip(moments, (slice(0, 3), slice(3, 6)), strict=True):
        part.add(found["pool"][taken, :256])  # of all 2048 features it takes their tool half a minute
    a, b = (m.gaussian() for m in moments)
    sides = [(np.mean(e, axis=0), np.cov(e, rowvar=False)) for e in (expected[:3, :256], expected[3:, :256])]
    theirs_distance = fid_score.calculate_frechet_distance(*sides[0], *sides[1])
    assert frechet_distance(a, b) == pytest.approx(theirs_distance, rel=1e-3)


def test_features_are_those_of_torch_fidelity_with_tensorflow_resizing(weights, images):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    names = ["2048", "logits_unbiased"]
    reference = fidelity.FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(weights)).eval()
    with torch.inference_mode():
        pool, logits = reference(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = inception.InceptionFeatures(weights, resize="tensorflow")(images)
    np.testing.assert_allclose(found["pool"], pool.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["logits"], logits.numpy(), rtol=1e-3, atol=1e-3)


def test_the_resizings_differ_and_the_spatial_features_are_of_the_named_layer(weights, images):
    a, b = (inception.InceptionFeatures(weights, resize=r) for r in inception.RESIZES)
    assert np.abs(a(images)["pool"] - b(images)["pool"]).max() > 1e-3
    kept = []
    b._network.Mixed_6d.branch1x1.bn.register_forward_hook(lambda m, i, o: kept.append(o))
    spatial = b(images[:2])["spatial"]
    np.testing.assert_array_equal(spatial, torch.relu(kept[0])[:, :7].permute(0, 2, 3, 1).flatten(1).numpy())


def test_missing_or_wrong_weights_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=inception.SHA256):
        inception.weights_file(tmp_path / "none.pth")
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="does not hold Inception weights"):
        inception.InceptionFeatures(tmp_path / "x.pth")
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match=r"no network.*put pt_inception"):
        inception.weights_file(None)
