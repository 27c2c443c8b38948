"""Kills a sampling run with SIGKILL at random moments, again and again, and compares what is left with an undisturbed run.

    python tests/kill_trials.py results/kill_trials.json

The demo model in five steps on a CPU, two processes as under torchrun, shards of two images. Prints what it wrote.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modiff_trt.tools.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
IMAGES, RANKS, KILLS = 800, 2, 20
MODEL = ["--config", ROOT / "configs/demo.yml", "--ckpt", ROOT / "calib_cache/demo/model.safetensors"]


def start(out):
    options = [*MODEL, "--timesteps", 5, "--num-samples", IMAGES, "--batch-size", 2, "--shards", "--out", out]
    command = [sys.executable, "-m", "modiff_trt.tools.cli.main", "sample", *map(str, options)]
    ranks = (
        {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(RANKS)
    )
    return [subprocess.Popen(command, env=os.environ | rank, stdout=subprocess.DEVNULL) for rank in ranks]


def files(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.npy")}


def main():
    chance, moments = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        alone, disturbed = (Path(folder) / name for name in ("alone", "disturbed"))
        assert [process.wait() for process in start(alone)] == [0] * RANKS
        expected = files(alone)
        wrong = 0
        while len(moments) < KILLS:
            processes = start(disturbed)
            moment = chance.uniform(3.0, 6.0)
            time.sleep(moment)
            if all(process.poll() is not None for process in processes):
                break  # complete before it could be killed
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
            found = files(disturbed)
            wrong += sum(expected.get(name) != digest for name, digest in found.items())
            moments.append({"seconds": round(moment, 2), "shards_there": len(found)})
        assert [process.wait() for process in start(disturbed)] == [0] * RANKS
        found = files(disturbed)
        result = {
            "what": f"kill -9 of {RANKS} processes that make {IMAGES} images, at random moments; then one run to the end",
            "kills": len(moments),
            "moments": moments,
            "shards": len(expected),
            "lost": len(expected.keys() - found.keys()),
            "doubled": len(found.keys() - expected.keys()),
            "changed": sum(found[name] != expected[name] for name in found.keys() & expected.keys()),
            "wrong_after_a_kill": wrong,
            **provenance(),
        }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in result.items() if k != "moments"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
