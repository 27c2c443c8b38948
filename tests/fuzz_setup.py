"""The set-up of fuzz_trials.py: one of every artefact, of a tiny network, and which commands read each of them."""

import json
import shutil
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import fuzz_alterations as alterations
import numpy as np
import torch
import yaml
from conftest import ROOT, ddim_state, random_checkpoint, tiny_config, tiny_tree
from fuzz_alterations import BYTES, JSON, NAMES, SPECIAL
from PIL import Image
from safetensors.torch import save_file

from modiff_trt.core.files import digest_of, save_arrays, write_signed
from modiff_trt.core.manifest import PLAN_SCHEMA, START_KIND, START_SCHEMA
from modiff_trt.core.start_state import start_state
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.plan import load_plan
from modiff_trt.tools.cli.main import main
from modiff_trt.tools.evaluation.cifar_features import SHIPPED_SHA256, CifarFeatures
from modiff_trt.tools.evaluation.measures import open_reference
from modiff_trt.tools.package import deployed
from modiff_trt.tools.stopping import exit_code

SIZE, CLASSIFIER = 12, ROOT / "calib_cache/fd_cifar/classifier.safetensors"


def config_file(path):
    tree = tiny_tree(SIZE, (1, 2), (6,))
    tree = {name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()} for name, section in tree.items()}
    path.write_text(yaml.safe_dump(tree))


def make_files(base):
    """Everything but what commands write."""
    config_file(base / "c.yml")
    state = ddim_state(random_checkpoint(tiny_config(SIZE, (1, 2), (6,))).params, 2)
    other = {name: value * 1.01 for name, value in state.items()}
    save_file(state, base / "model.safetensors")
    torch.save(state, base / "model.pt")
    torch.save([other, {"state": {}, "lr": 0.1}, 3, 100, state], base / "train.ckpt")
    torch.save({"state_dict": other, "ema": state}, base / "both.pt")
    chance = np.random.default_rng(0)
    np.save(base / "noise.npy", chance.standard_normal((2, 3, SIZE, SIZE), np.float32))
    images = chance.integers(0, 256, (6, 32, 32, 3), np.uint8)
    np.savez(base / "guided.npz", arr_0=images)
    np.savez(base / "other.npz", arr_0=255 - images)
    identity = {"mu": np.zeros(2048, np.float32), "sigma": np.eye(2048, dtype=np.float32)}
    np.savez_compressed(base / "fid.npz", **identity)
    spatial = {"mu_s": np.zeros(2023, np.float32), "sigma_s": np.eye(2023, dtype=np.float32)}
    np.savez_compressed(base / "adm.npz", arr_0=images, **identity, **spatial)
    with tarfile.open(base / "cifar.tar.gz", "w:gz", compresslevel=1) as archive:
        for number in (1, 2, 3):
            data = b"".join(b"\x03" + image.transpose(2, 0, 1).tobytes() for image in images[2 * number - 2 : 2 * number])
            member = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{number}.bin")
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    for folder, step in (("pictures", 0), ("pictures2", 3)):
        (base / folder).mkdir()
        for number, suffix in enumerate(("png", "jpg", "bmp", "tiff", "webp", "png", "gif")):
            pixels = np.roll(images[number % 6, :SIZE, :SIZE], step)
            Image.fromarray(pixels).save(base / folder / f"p{number}.{suffix}")
    shutil.copy(CLASSIFIER, base / "classifier.safetensors")


def make_plan(base):
    """What engines.plan_files.build_into writes, around bytes that are no engine."""
    model, data = load_onnx(base / "m.onnx"), bytes(range(256)) * 20
    shapes = {i.name: tuple(i.shape[1:]) for i in model.session.get_inputs()}
    start = start_state(model.proto, model.manifest, shapes)
    (base / "p").mkdir()
    header = {"kind": START_KIND, "schema": START_SCHEMA, "onnx_sha256": model.sha256}
    save_arrays(base / "p/m.start.safetensors", header, start)
    layer = {"name": "l", "nodes": ["n"], "kind": "conv", "inputs": ["a"], "outputs": ["b"], "tactic": "t"}
    report = {
        "told": True,
        "table": [layer],
        "layers": 1,
        "plugin_layers": 0,
        "quantized_layers_in_int8": 1,
        "quantized_layers": 1,
    }
    manifest = {"schema": PLAN_SCHEMA, "plan_sha256": digest_of(data), "onnx_sha256": model.sha256, "runtime": "tensorrt"}
    manifest |= {"version": "11.0", "target": "sm89", "plugin": True, "network": model.manifest, "report": report}
    options = {"min_batch": 1, "opt_batch": 2, "max_batch": 4, "tokens": 77, "target": None, "level": None}
    options["version_compatible"] = False
    write_signed(base / "p/m.json", manifest | {"options": options})
    (base / "p/m.plan").write_bytes(data)


MODEL = "--config {base}/c.yml --ckpt {base}/model.safetensors"
CKPT = "--config {base}/c.yml --ckpt IN"
YML = "--config IN --ckpt {base}/model.safetensors"
FEW = "--timesteps 2 --num-samples 1 --out OUT/s.npz"
COLLECT = "--timesteps 3 --num-samples 2 --calib-steps 3 --out OUT/t.safetensors"
SIM = f"sample {MODEL} --backend torch-sim --num-samples 2"
ONCE = "--batch-sizes 1 --num-warmup 0 --num-runs 1 --num-passes 1"
BENCH = f"bench {MODEL} --scales {{base}}/s.safetensors {ONCE} --backends"
EVALUATE = "evaluate --features none --name x --out OUT/e.json"
MAKE = (
    f"collect {MODEL} --timesteps 3 --num-samples 2 --calib-steps 3 --out {{base}}/t.safetensors",
    f"calibrate {MODEL} --trajectories {{base}}/t.safetensors --act-bit 6 --out {{base}}/s.safetensors",
    f"export {MODEL} --scales {{base}}/s.safetensors --out {{base}}/m.onnx",
    f"export {MODEL} --out {{base}}/f.onnx",
    f"export {MODEL} --scales {{base}}/s.safetensors --dtype fp16 --out {{base}}/m16.onnx",
    f"{SIM} --scales {{base}}/s.safetensors --out {{base}}/a",
    f"{SIM} --scales {{base}}/s.safetensors --out {{base}}/a.npz",
    f"{SIM} --scales {{base}}/s.safetensors --shards --out {{base}}/sh",
    f"sample {MODEL} --timesteps 3 --num-samples 2 --out {{base}}/b",
    f"sample {MODEL} --timesteps 3 --num-samples 2 --out {{base}}/b.npz",
    "evaluate --features none --name x --samples {base}/a --same-noise {base}/b --out {base}/results.json",
    "evaluate --samples {base}/guided.npz --reference {base}/other.npz --out {base}/fd.json",
    f"{BENCH} torch-fp32,torch-sim --out {{base}}/bench.json",
    "package --onnx {base}/m.onnx --out {base}/sampler",
    "package --onnx {base}/f.onnx --timesteps 2 --out {base}/sampler2",
)


def describe(arrays):
    return {name: digest_of(f"{a.dtype} {a.shape}".encode() + a.tobytes()) for name, a in sorted(arrays.items())}


def _load_plan(path):
    plan = load_plan(Path(path))
    figures = describe(plan.start) | {"plan": digest_of(plan.data), "batches": plan.batches}
    figures["steps"] = plan.calibrated_rows.timesteps
    return figures | {"network": digest_of(json.dumps(plan.manifest["network"], sort_keys=True).encode())}


def _classifier(path, expected=SHIPPED_SHA256):
    features = CifarFeatures(Path(path), "cpu", expected)
    return describe(features(np.arange(3072, dtype=np.uint8).reshape(1, 32, 32, 3))) | {"weights_sha256": features.digest}


def _reference(path):
    found = open_reference(Path(path))
    gaussians = found.statistics.gaussians if found.statistics is not None else {}
    figures = {name: describe({"mean": g.mean, "covariance": g.covariance}) for name, g in gaussians.items()}
    # What `evaluate` could put on record of such a file.
    figures["reference_sha256"] = digest_of(Path(path).read_bytes())
    return figures | {"images": found.images.count if found.images is not None else None}


def sampler(folder, *arguments):
    sys.argv = [f"{folder}/modiff-sampler", *arguments]
    return deployed.main(list(arguments))


FUNCTIONS = {
    "!load_plan": _load_plan,
    "!classifier": _classifier,
    "!classifier2": lambda path: _classifier(path, None),
    "!reference": _reference,
}


def run_command(arguments):
    """Runs a command of the program, or one of FUNCTIONS in its place; returns the exit code."""
    name, *rest = arguments
    if name == "!sampler":
        return sampler(*rest)
    if name in FUNCTIONS:

        def run():
            sys.stdout.write(json.dumps(FUNCTIONS[name](*rest)))
            return 0

        return exit_code(run, lambda line: sys.stderr.write(line + "\n"))
    main(arguments)
    return 0


@dataclass(frozen=True)
class Target:
    """An artefact, the files in it that are altered (itself, or a pattern inside a folder), how, and what reads it. `foreign`:
    it is of other programs, and carries no checksum, so that another content may give another result."""

    artefact: str
    alterations: dict
    commands: tuple
    files: str = ""
    foreign: bool = False


FILE = BYTES | SPECIAL
NAMED = FILE | NAMES
PIPE = (f"{SIM} --scales IN --out OUT/s.npz", "inspect IN", f"export {MODEL} --scales IN --out OUT/m.onnx")
NATIVE = f"sample {MODEL} --backend native --num-samples 1 --scales IN --out OUT/s.npz"
ONNX = "sample --backend onnx --num-samples 1 --onnx IN --out OUT/s.npz"
PICTURES = (
    f"{EVALUATE} --samples IN --same-noise {{base}}/pictures2",
    f"{EVALUATE} --samples {{base}}/pictures2 --same-noise IN",
)
OURS = (f"{EVALUATE} --samples IN --same-noise {{base}}/b", f"{EVALUATE} --samples {{base}}/b.npz --same-noise IN")
OURS_DIRECT = (*OURS, f"{SIM} --scales {{base}}/s.safetensors --out IN")
SHARDS = (*OURS, f"{SIM} --scales {{base}}/s.safetensors --shards --out IN")
FD = "evaluate --name x --out OUT/e.json"
REFERENCE = f"{FD} --samples {{base}}/guided.npz --reference IN"
SAME32 = (
    f"{EVALUATE} --samples IN --same-noise {{base}}/other.npz",
    f"{EVALUATE} --samples {{base}}/other.npz --same-noise IN",
)
REPORT = f"report {MODEL} --scales {{base}}/s.safetensors --num-samples 1 --out OUT/r.html"
SAMPLER = ("!sampler IN -n 1 -o OUT/s.npz",)
RESULTS = "evaluate --features none --name x --out IN --samples {base}/a --same-noise {base}/b"
YAML_READERS = (f"sample {YML} {FEW}", f"collect {YML} {COLLECT}")
NOISE = (
    f"sample {MODEL} {FEW} --noise IN",
    "sample --backend onnx --num-samples 1 --onnx {base}/m.onnx --out OUT/s.npz --noise IN",
)
FD_GUIDED = "evaluate --samples {base}/guided.npz --reference {base}/other.npz --name x --out OUT/e.json"
HEADERS = alterations.OUTER | alterations.INNER | alterations.RESIGNED

KINDS = {
    "checkpoint": [
        Target(
            "model.safetensors",
            NAMED | alterations.SAFETENSORS,
            (f"sample {CKPT} {FEW}", f"collect {CKPT} {COLLECT}"),
            "",
            True,
        ),
        *(
            Target(name, NAMED | alterations.TORCH, (f"sample {CKPT} {FEW}",), "", True)
            for name in ("model.pt", "train.ckpt", "both.pt")
        ),
    ],
    "configuration": [
        Target("c.yml", alterations.YAML, YAML_READERS, "", True),
        Target("c.yml", alterations.YAML | NAMED, YAML_READERS, "", True),
    ],
    "trajectories": [
        Target(
            "t.safetensors",
            NAMED | HEADERS,
            (f"calibrate {MODEL} --trajectories IN --out OUT/s.safetensors",),
        )
    ],
    "scales": [
        Target("s.safetensors", NAMED | HEADERS, (*PIPE, NATIVE)),
        Target("s.safetensors", alterations.RESIGNED, (*PIPE, NATIVE)),
    ],
    "ONNX file": [
        Target("m.onnx", NAMED | alterations.ONNX, (ONNX, "package --onnx IN --out OUT/sampler")),
        Target("f.onnx", NAMED | alterations.ONNX, (f"{ONNX} --timesteps 2",)),
    ],
    "folder of images": [
        Target("a", FILE | alterations.SIGNED_JSON, OURS_DIRECT, "manifest.json"),
        Target("a", FILE, OURS_DIRECT, "manifest.sha256"),
        Target("a", FILE | alterations.PICTURES, OURS_DIRECT, "*.png"),
        Target("a", SPECIAL | NAMES, OURS),
    ],
    "folder of shards": [
        Target("sh", FILE | alterations.SIGNED_JSON, SHARDS, "manifest.json"),
        Target("sh", FILE, SHARDS, "manifest.sha256"),
        Target("sh", FILE | alterations.NPY, SHARDS, "*.npy"),
    ],
    ".npz of ours": [Target("a.npz", NAMED | alterations.NPZ | alterations.NPZ_MANIFEST, OURS)],
    ".npz of guided-diffusion": [
        Target("guided.npz", NAMED | alterations.NPZ, (*SAME32, REFERENCE), "", True),
        Target("adm.npz", NAMED | alterations.NPZ, ("!reference IN", SAME32[0]), "", True),
    ],
    "statistics of pytorch-fid": [Target("fid.npz", NAMED | alterations.NPZ, ("!reference IN",), "", True)],
    "CIFAR-10 archive": [Target("cifar.tar.gz", NAMED | alterations.TAR, (*SAME32, REFERENCE), "", True)],
    "folder of pictures": [
        Target("pictures", FILE | alterations.PICTURES, PICTURES, "p*.*", True),
        Target("pictures", alterations.PICTURES, PICTURES, "p*.*", True),
    ],
    "noise": [Target("noise.npy", NAMED | alterations.NPY, NOISE, "", True)],
    "results of evaluate": [
        Target("results.json", NAMED | JSON, (RESULTS,)),
        Target("results.json", FILE | JSON, (f"{REPORT} --evaluation IN",)),
    ],
    "results of bench": [Target("bench.json", NAMED | JSON, (f"{REPORT} --bench IN",))],
    "deployed sampler": [
        Target("sampler", FILE | alterations.SIGNED_JSON, SAMPLER, "about.json"),
        Target("sampler2", FILE | alterations.SIGNED_JSON, SAMPLER, "about.json"),
        Target("sampler", FILE | alterations.ONNX, SAMPLER, "network.onnx"),
    ],
    "plan": [
        Target("p", FILE | alterations.SIGNED_JSON, ("!load_plan IN/m.plan", f"{REPORT} --plan IN/m.plan"), "m.json"),
        Target("p", alterations.SIGNED_JSON, ("!load_plan IN/m.plan",), "m.json"),
        Target("p", FILE | HEADERS, ("!load_plan IN/m.plan",), "m.start.safetensors"),
        Target("p", FILE, ("!load_plan IN/m.plan",), "m.plan"),
    ],
    "classifier": [
        Target("classifier.safetensors", NAMED | alterations.SAFETENSORS, ("!classifier IN",)),
        Target("classifier.safetensors", NAMED | alterations.SAFETENSORS, ("!classifier2 IN",), "", True),
    ],
    "cache": [Target("cache", FILE | alterations.INNER | alterations.RESIGNED, (FD_GUIDED,), "*.safetensors")],
}
