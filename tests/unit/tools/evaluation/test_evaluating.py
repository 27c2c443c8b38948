"""`evaluate` on real files: distances by pytorch-fid's arithmetic on the same features, pairs, the cache, the paper's table."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import sha256, write_signed
from modiff_trt.networks.checkpoint import KNOWN_MD5
from modiff_trt.runtime.images.digest_list import append_sums
from modiff_trt.runtime.images.folders import save_npz, to_uint8
from modiff_trt.runtime.images.sets import open_images
from modiff_trt.tools.assets import classifier_path
from modiff_trt.tools.cli.evaluate import HEADINGS, rows_of
from modiff_trt.tools.cli.main import app
from modiff_trt.tools.evaluation import measures as evaluating
from modiff_trt.tools.evaluation.measures import label, method_name, open_features


def pictures(folder, count, seed, noise=0):
    """Smooth pictures of 32 x 32, and the same with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (count, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    disturbed = coarse + noise * np.random.default_rng(99).standard_normal(coarse.shape)
    images = to_uint8(disturbed.astype(np.float32))
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return images


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.setenv("MODIFF_TRT_CACHE", str(tmp_path / "cache"))
    real = pictures(tmp_path / "real", 40, 0)
    exact = pictures(tmp_path / "exact", 24, 1)
    quantized = pictures(tmp_path / "quantized", 24, 1, noise=0.05)
    return {"real": real, "exact": exact, "quantized": quantized}


def statistics_of(path, network, batch_size):
    source = evaluating.open_reference(path).source(network)
    return source if isinstance(source, evaluating.Statistics) else evaluating.reference_statistics(source, network, batch_size)


def run(*arguments):
    app(["evaluate", *map(str, arguments)], standalone_mode=False)


def test_distances_and_pairs(sets, tmp_path):
    fid = pytest.importorskip("pytorch_fid.fid_score")
    out = tmp_path / "results.json"
    arguments = ["--samples", tmp_path / "quantized", "--reference", tmp_path / "real", "--same-noise", tmp_path / "exact"]
    run(*arguments, "--out", out, "--batch-size", 7)
    found = json.loads(out.read_text())["sets"]["quantized"]
    features = open_features("fd-cifar", None, "cpu", "torch")
    sides = []
    for name in ("quantized", "real"):
        x = features(sets[name])["features"].astype(np.float64)
        sides += [x.mean(0), np.cov(x, rowvar=False)]
    assert found["fd-cifar"]["FD-CIFAR"] == pytest.approx(fid.calculate_frechet_distance(*sides), rel=1e-3)
    mse = ((sets["quantized"].astype(float) - sets["exact"]) ** 2).mean()
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 / mse))
    assert 0.5 < found["ssim"] < 1
    assert found["pairs"]["with"] == "the set exact"  # which does not say that it is of full precision
    assert found["fd-cifar"]["to its pair"]["FD-CIFAR"] < found["fd-cifar"]["FD-CIFAR"]
    run(*arguments, "--out", out, "--batch-size", 24, "--name", "again")  # other batches, and the reference from the cache
    again = json.loads(out.read_text())["sets"]
    assert set(again) == {"quantized", "again"}
    assert again["again"]["fd-cifar"]["FD-CIFAR"] == pytest.approx(found["fd-cifar"]["FD-CIFAR"], rel=1e-4)


def test_the_reference_is_measured_once_for_each_content(sets, tmp_path):
    calls = []
    network = open_features("fd-cifar", None, "cpu", "torch")

    class Counted:
        name, digest = network.name, network.digest

        def __call__(self, images):
            calls.append(len(images))
            return network(images)

    first = statistics_of(tmp_path / "real", Counted(), 16)
    second = statistics_of(tmp_path / "real", Counted(), 16)
    assert sum(calls) == 40 and first.count == second.count == 40
    np.testing.assert_array_equal(first.gaussians["features"].covariance, second.gaussians["features"].covariance)
    Image.fromarray(sets["real"][0]).save(tmp_path / "real/99999.png")
    assert statistics_of(tmp_path / "real", Counted(), 16).count == 41


def test_statistics_of_pytorch_fid_are_references_for_inception_only(sets, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    network = open_features("fd-cifar", None, "cpu", "torch")
    with pytest.raises(InputError, match="Inception statistics"):
        statistics_of(tmp_path / "stats.npz", network, 16)

    class Inception:
        name, digest = "inception", "x"

    found = statistics_of(tmp_path / "stats.npz", Inception(), 16)
    assert set(found.gaussians) == {"pool"}
    # guided-diffusion's reference batches carry images beside the statistics, for other features and measures.
    spatial = {"mu_s": np.ones(2023), "sigma_s": 2 * np.eye(2023)}
    np.savez(tmp_path / "batch.npz", arr_0=sets["real"], mu=np.zeros(2048), sigma=np.eye(2048), **spatial)
    assert statistics_of(tmp_path / "batch.npz", network, 16).count == 40
    found = statistics_of(tmp_path / "batch.npz", Inception(), 16)
    assert set(found.gaussians) == {"pool", "spatial"} and found.gaussians["spatial"].mean[0] == 1
    np.savez(tmp_path / "images.npz", arr_0=sets["real"])
    assert evaluating.open_reference(tmp_path / "images.npz").statistics is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(768), "sigma": np.eye(768)}, "2048 features"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2047)}, "2048 features"),
        ({"mu": np.zeros((2048, 1)), "sigma": np.eye(2048)}, "2048 features"),
        ({"mu": np.zeros(2048)}, "half of its statistics"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
        ({"mu": np.zeros(2048), "sigma": np.tri(2048)}, "no covariance"),
        ({"mu": np.zeros(2048), "sigma": np.full((2048, 2048), "x")}, "types"),
        ({"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}, "none for FID"),
    ],
)
def test_statistics_of_another_layout_are_refused_before_anything_is_measured(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputError, match=message):
        evaluating.open_reference(tmp_path / "s.npz")


def test_pairs_must_fit(sets, tmp_path):
    with pytest.raises(InputError, match="pairs need the same images"):
        evaluating.paired(open_images(tmp_path / "real"), open_images(tmp_path / "exact"), 8)
    assert evaluating.paired(open_images(tmp_path / "exact"), open_images(tmp_path / "exact"), 8)["psnr_db"] is None


def test_the_paper_s_figures_stand_beside_the_same_method_and_bits():
    made = {"method": "modiff", "granularity": "static", "weight_bits": 8, "act_bits": 6}
    entry = {"images": 10, "made by": {"quantization": made, "checkpoint_sha256": "ab" * 32}, "psnr_db": 40.0}
    (row,) = rows_of({"sets": {"mine": entry}}, paper_always=True)
    assert rows_of({"sets": {"mine": entry}})[0][HEADINGS.index("paper: IS / FID / sFID")] == ""  # another checkpoint's
    official = entry | {"made by": entry["made by"] | {"checkpoint": next(iter(KNOWN_MD5.values()))}}
    assert rows_of({"sets": {"mine": official}})[0][:9] == row[:9]
    cells = dict(zip(HEADINGS, row, strict=True))
    assert cells["method"] == "Q-Diff + MoDiff" and cells["bits"] == "W8A6"
    assert cells["paper: IS / FID / sFID"] == "9.38 / 4.19 / 4.32" and cells["ours"] == cells["FD-CIFAR"] == ""
    assert method_name(made | {"method": "qdiff", "granularity": "tensor"}) == "LTQ"
    assert method_name({"method": "float"}) == "full precision"


def test_the_shipped_classifier_is_the_one_that_was_measured():
    """Its accuracy, of the test images after JPEG compression, was measured with this very file."""
    path, said = classifier_path(), json.loads((ROOT / "results/fd_cifar.json").read_text())
    assert path.stat().st_size == said["bytes"] < 6_000_000
    assert sha256(path) == said["sha256"] and said["test_accuracy"] >= 0.93


def test_damaged_references_and_results_are_one_line(sets, tmp_path, capsys):
    from modiff_trt.tools.cli.main import main

    def said(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(["evaluate", "--samples", str(tmp_path / "exact"), *map(str, arguments)])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    np.savez(tmp_path / "whole.npz", images=sets["real"])
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "none.npz", images=sets["real"][:0])
    for name, what in (("half", "cannot be read"), ("empty", "cannot be read"), ("none", "holds no image")):
        assert what in said("--reference", tmp_path / f"{name}.npz", "--out", tmp_path / "r.json")
    out = tmp_path / "foreign.json"
    out.write_text('{"sets": {"x": {}}}')
    assert "not a results file" in said("--same-noise", tmp_path / "quantized", "--out", out)
    assert out.read_text() == '{"sets": {"x": {}}}'
    out.write_text(json.dumps({"sets": {"exact": {"images": 1, "made by": {"seed": 1}}}}))
    assert "pass --name" in said("--same-noise", tmp_path / "quantized", "--out", out)
    for folder, seed in (("exact", 0), ("quantized", 1)):
        made = {"seed": seed, "eta": 0, "batch_size": 1}
        write_signed(tmp_path / folder / "manifest.json", made)
        append_sums(tmp_path / folder, {f.name: sha256(f) for f in (tmp_path / folder).glob("*.png")})
    assert "differ in seed" in said("--same-noise", tmp_path / "quantized", "--out", tmp_path / "r.json")
    (tmp_path / "exact/00003.png").unlink()
    assert "are missing" in said("--same-noise", tmp_path / "quantized", "--out", tmp_path / "r.json")


def test_pairs_of_any_size_need_no_features(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", images=rng.integers(0, 256, (3, 20, 14, 1), dtype=np.uint8))
    run("--samples", tmp_path / "a.npz", "--same-noise", tmp_path / "b.npz", "--features", "none", "--out", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["sets"]["a"]
    assert found["psnr_db"] > 0 and "fd-cifar" not in found
    assert found["pairs"]["paired"] == "by their order, because neither set has names"


def test_what_was_measured_before_stays(sets, tmp_path):
    out = tmp_path / "r.json"
    run("--samples", tmp_path / "quantized", "--same-noise", tmp_path / "exact", "--features", "none", "--out", out)
    run("--samples", tmp_path / "quantized", "--reference", tmp_path / "real", "--out", out)
    assert {"psnr_db", "ssim", "fd-cifar"} <= set(json.loads(out.read_text())["sets"]["quantized"])


def test_figures_of_other_images_do_not_stay(sets, tmp_path):
    out = tmp_path / "r.json"
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    np.savez(tmp_path / "x/i.npz", images=sets["exact"])
    np.savez(tmp_path / "y/i.npz", images=sets["quantized"])
    run("--samples", tmp_path / "x/i.npz", "--reference", tmp_path / "real", "--out", out)
    first = json.loads(out.read_text())["sets"]["i"]
    pair = ("--same-noise", tmp_path / "exact", "--out", out)
    with pytest.raises(InputError, match="fd-cifar of other images"):
        run("--samples", tmp_path / "y/i.npz", *pair, "--features", "none")
    run("--samples", tmp_path / "y/i.npz", *pair)
    second = json.loads(out.read_text())["sets"]["i"]
    assert second["fd-cifar"] != first["fd-cifar"] and second["psnr_db"] is not None


def test_a_copy_of_the_images_is_the_same_set(sets, tmp_path):
    out = tmp_path / "r.json"
    run("--samples", tmp_path / "quantized", "--reference", tmp_path / "real", "--out", out)
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "quantized", tmp_path / "moved/quantized", copy_function=shutil.copyfile)
    run("--samples", tmp_path / "moved/quantized", "--same-noise", tmp_path / "exact", "--features", "none", "--out", out)
    assert {"psnr_db", "fd-cifar"} <= set(json.loads(out.read_text())["sets"]["quantized"])


def test_a_damaged_manifest_does_not_spoil_the_results(sets, tmp_path):
    out = tmp_path / "r.json"
    pair = ("--same-noise", tmp_path / "exact", "--features", "none", "--out", out)
    run("--samples", tmp_path / "quantized", *pair)
    before = out.read_text()
    write_signed(tmp_path / "quantized/manifest.json", {"quantization": "abc"})
    append_sums(tmp_path / "quantized", {f.name: sha256(f) for f in (tmp_path / "quantized").glob("*.png")})
    with pytest.raises(InputError, match="is damaged; sample again"):
        run("--samples", tmp_path / "quantized", "--name", "other", *pair)
    assert out.read_text() == before


def test_pairs_begin_with_the_same_image(tmp_path):
    rng = np.random.default_rng(0)
    for name, first in (("a", 0), ("b", 4)):
        save_npz(tmp_path / f"{name}.npz", rng.standard_normal((3, 3, 8, 8), np.float32), range(first, first + 3), {"seed": 0})
    sides = [open_images(tmp_path / f"{name}.npz") for name in ("a", "b")]
    assert [side.first for side in sides] == [0, 4] and sides[0].manifest == {"seed": 0}
    with pytest.raises(InputError, match="the first image"):
        evaluating.paired(*sides, 2)


def test_a_cache_that_cannot_be_used_costs_time_only(sets, tmp_path, monkeypatch):
    network = open_features("fd-cifar", None, "cpu", "torch")
    first = statistics_of(tmp_path / "real", network, 16)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(b"damaged")
    again = statistics_of(tmp_path / "real", network, 16)
    np.testing.assert_array_equal(first.gaussians["features"].mean, again.gaussians["features"].mean)
    monkeypatch.setenv("MODIFF_TRT_CACHE", "/dev/null/nowhere")
    assert statistics_of(tmp_path / "real", network, 16).count == 40


def test_statistics_of_other_features_or_damaged_ones_are_refused(sets, tmp_path):
    network = open_features("fd-cifar", None, "cpu", "torch")
    found = evaluating.measure(open_images(tmp_path / "real"), network, 16, score=False)
    file = tmp_path / "statistics.safetensors"
    evaluating.save_statistics(file, found, network, of="real")
    loaded = evaluating.load_statistics(file, network)
    assert loaded.sha256() == found.sha256() and loaded.count == 40
    digest, network.digest = network.digest, "0" * 64
    with pytest.raises(InputError, match="statistics of other features"):
        evaluating.load_statistics(file, network)
    network.digest = digest
    bad = replace(found.gaussians["features"], covariance=np.full((320, 320), np.nan))
    evaluating.save_statistics(file, replace(found, gaussians={"features": bad}), network, of="real")
    with pytest.raises(InputError, match="no covariance of finite numbers"):
        evaluating.load_statistics(file, network)
    evaluating.save_statistics(file, replace(found, gaussians={}), network, of="real")
    with pytest.raises(InputError, match="lacks"):
        evaluating.load_statistics(file, network)


def test_the_classifier_can_be_trained_again(tmp_path):
    """Two colours, two classes: an epoch on few images learns them, and the folded file answers like the network."""
    import torch

    from modiff_trt.tools.evaluation.cifar_features import CifarFeatures, normalize
    from modiff_trt.tools.research.train_classifier import accuracy, main, train

    labels = np.arange(128, dtype=np.uint8) % 2
    images = np.random.default_rng(0).integers(0, 60, (128, 32, 32, 3), dtype=np.uint8)
    images[labels == 1] += 190
    np.savez(tmp_path / "l.npz", images=images, labels=labels, test_images=images[:50], test_labels=labels[:50])
    main(tmp_path / "l.npz", tmp_path / "c.safetensors", epochs=2, seed=0)
    assert accuracy(tmp_path / "c.safetensors", (images[:50], labels[:50])) > 0.9
    network = train((images[:64], labels[:64]), 1, 0).eval()
    from safetensors.numpy import save_file

    save_file(network.folded(), tmp_path / "d.safetensors")
    with torch.no_grad():
        x = normalize(torch.from_numpy(images[:4]))
        expected = ((network(x) + network(x.flip(3))) / 2).numpy()
    found = CifarFeatures(tmp_path / "d.safetensors")(images[:4])["logits"]
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


def test_a_pair_is_called_what_its_manifest_says(sets, tmp_path):
    made = {"seed": 0, "eta": 0, "batch_size": 1, "backend": "native"}
    bits = {"granularity": "static", "weight_bits": 8, "act_bits": 8}
    names = {}
    for method in ("modiff", "qdiff", "float"):
        folder = tmp_path / method
        shutil.copytree(tmp_path / "exact", folder)
        write_signed(folder / "manifest.json", made | {"quantization": bits | {"method": method}})
        append_sums(folder, {f.name: sha256(f) for f in folder.glob("*.png")})
        names[method] = label(open_images(folder))
    assert names == {"modiff": "native Q-Diff + MoDiff W8A8", "qdiff": "native Q-Diff W8A8", "float": "full precision"}
    out = tmp_path / "r.json"
    run("--samples", tmp_path / "modiff", "--same-noise", tmp_path / "qdiff", "--out", out)
    entry = json.loads(out.read_text())["sets"]["modiff"]
    assert entry["pairs"]["with"] == "native Q-Diff W8A8" and "to full precision" not in entry["fd-cifar"]
    run("--samples", tmp_path / "modiff", "--same-noise", tmp_path / "float", "--name", "x", "--out", out)
    assert "to full precision" in json.loads(out.read_text())["sets"]["x"]["fd-cifar"]


def test_images_that_change_after_their_digest_was_recorded_are_refused(sets, tmp_path):
    """Or the digest beside the figures would be of other images."""
    network = open_features("fd-cifar", None, "cpu", "torch")
    images, exact = open_images(tmp_path / "quantized"), open_images(tmp_path / "exact")
    assert images.content_sha256() == open_images(tmp_path / "quantized").content_sha256()
    Image.fromarray(sets["exact"][3]).save(tmp_path / "quantized/00003.png")
    with pytest.raises(InputError, match="changed while"):
        evaluating.measure(images, network, 8, score=False)
    with pytest.raises(InputError, match="changed while"):
        evaluating.paired(images, exact, 8)
    assert evaluating.paired(open_images(tmp_path / "quantized"), exact, 8)["psnr_db"] > 0
