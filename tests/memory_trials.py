"""Peak host memory of `sample` and `evaluate` at several numbers of images, each in a process of its own.

python tests/memory_trials.py results/memory_trials.json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from modiff_trt.tools.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
SAMPLED, EVALUATED = (8, 32, 128), (1_000, 4_000, 16_000)
MODEL = ["--config", ROOT / "configs/demo.yml", "--ckpt", ROOT / "calib_cache/demo/model.safetensors"]


def peak(*arguments, **environment):
    """MB that a run of the command line has held at most."""
    command = [sys.executable, "-m", "modiff_trt.tools.cli.main", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return round(usage.ru_maxrss / 1024, 1)


def main():
    result = {"what": "peak resident memory in MB by number of images", "sample": {}, "evaluate": {}}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        scales = ROOT / "calib_cache/demo/modiff-w8a8.safetensors"
        for count in SAMPLED:
            options = ["--backend", "native", "--scales", scales, *MODEL, "--num-samples", count, "--batch-size", 8, "--shards"]
            result["sample"][count] = peak("sample", *options, "--out", here / f"s{count}")
        for count in EVALUATED:
            images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            np.savez(here / "images.npz", images=images)
            options = ["--samples", here / "images.npz", "--same-noise", here / "images.npz", "--out", here / f"e{count}.json"]
            result["evaluate"][count] = peak("evaluate", *options, MODIFF_TRT_CACHE=str(here / "cache"))
    Path(sys.argv[1]).write_text(json.dumps(result | provenance(), indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
