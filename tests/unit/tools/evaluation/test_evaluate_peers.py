"""`evaluate` beside the tools that people use, on the same folders and .npz files: figures equal to 1e-3.

pytorch-fid and torch-fidelity run as they are; guided-diffusion's evaluator, which needs TensorFlow, is its arithmetic (mean,
covariance and the trace of their product's root by numpy) over torch-fidelity's features. Random Inception weights: the
published ones are a download.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modiff_trt.tools.cli.main import app

fidelity = pytest.importorskip("torch_fidelity")
pytest.importorskip("pytorch_fid")

COUNT = 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of smooth 8-bit pictures, named so that their natural order is not that of their text."""
    base, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    found = {}
    for name, low in (("samples", 0), ("real", 60)):
        (base / name).mkdir()
        images = rng.integers(low, 256, (COUNT, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        for i, image in enumerate(images):
            Image.fromarray(image).save(base / name / f"sample_{i}.png")
        found[name] = images
    return base, found


def evaluate(base, weights, reference, *more):
    out = base / "r.json"
    out.unlink(missing_ok=True)
    arguments = ["--samples", base / "samples", "--reference", reference, "--features", "inception", "--inception", weights]
    app(["evaluate", *map(str, [*arguments, "--out", out, *more])], standalone_mode=False)
    (entry,) = json.loads(out.read_text())["sets"].values()
    return next(entry[name] for name in ("inception", "inception-tensorflow") if name in entry)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODIFF_TRT_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_fid_is_that_of_pytorch_fid(sets, weights, monkeypatch):
    from pytorch_fid import fid_score
    from pytorch_fid import inception as theirs

    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: state)
    base, _ = sets
    paths = [str(base / name) for name in ("samples", "real")]
    expected = fid_score.calculate_fid_given_paths(paths, 10, "cpu", 2048, num_workers=0)
    assert evaluate(base, weights, base / "real")["FID"] == pytest.approx(expected, rel=1e-3)
    fid_score.save_fid_stats([paths[1], str(base / "stats.npz")], 10, "cpu", 2048, num_workers=0)
    assert evaluate(base, weights, base / "stats.npz")["FID"] == pytest.approx(expected, rel=1e-3)


def features(images, weights):
    """pool3, the first channels of mixed_6/conv in TensorFlow's order [17, 17, 7], and logits, by torch-fidelity's network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)).eval()
    kept = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.inference_mode():
        pool, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    spatial = kept[0].permute(0, 2, 3, 1)[..., :7].reshape(len(images), -1)
    return pool.double().numpy(), spatial.double().numpy(), logits


def distance(x, y):
    """Its Frechet distance of two sets of features. The trace of the root of a product of covariances is the nuclear norm of
    the sets' cross product: the same number as scipy's root of a 2048 x 2048 matrix, to 1e-6, in a thousandth of the time."""
    mean, (a, b) = x.mean(0) - y.mean(0), ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    return mean @ mean + (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")


@pytest.mark.slow
def test_figures_are_those_of_torch_fidelity_and_guided_diffusion(sets, weights):
    base, images = sets
    (pool, spatial, logits), (real_pool, real_spatial, _) = (features(images[name], weights) for name in ("samples", "real"))
    fid, sfid = distance(pool, real_pool), distance(spatial, real_spatial)
    # Both read the folder; torch-fidelity's order of its files is that of their text.
    order = [int(name[7:-4]) for name in sorted(f"sample_{i}.png" for i in range(COUNT))]
    score = fidelity.metric_isc.isc_features_to_metric(logits[order])["inception_score_mean"]
    found = evaluate(base, weights, base / "real", "--resize", "tensorflow")
    assert found["FID"] == pytest.approx(fid, rel=1e-3) and found["sFID"] == pytest.approx(sfid, rel=1e-3)
    assert found["IS"] == pytest.approx(score, rel=1e-3)

    # A reference batch of guided-diffusion: its statistics count, and the images beside them do not.
    (mu, sigma), (mu_s, sigma_s) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real_pool, real_spatial))
    np.savez(base / "batch.npz", arr_0=images["samples"], mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    batch = evaluate(base, weights, base / "batch.npz", "--resize", "tensorflow")
    assert batch["FID"] == pytest.approx(fid, rel=1e-3) and batch["sFID"] == pytest.approx(sfid, rel=1e-3)
