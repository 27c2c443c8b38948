"""Times one image and four by the native backend and by onnxruntime in float, alone and beside busy processes.

    python tests/load_trials.py results/load_trials.json

The demo model in 50 steps on a CPU, each backend in a fresh process, the two in turns. Prints what it wrote.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from modiff_trt.runtime.backends.cores import usable_cores
from modiff_trt.tools.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
BATCHES, BUSY, REPEATS = (1, 4), (0, 1, 2), 3


def measure(backend, batch):
    """Seconds an image of a second trajectory, in this process."""
    from modiff_trt.core.scales import load_scales
    from modiff_trt.core.solvers import Solver
    from modiff_trt.export.onnx.network import build_onnx, save_onnx
    from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
    from modiff_trt.runtime.backends.registry import exported, trained
    from modiff_trt.runtime.backends.registry.options import load_model
    from modiff_trt.runtime.images.noise import ImageNoise
    from modiff_trt.runtime.sampler import sample_trajectory

    network, checkpoint = load_model(ROOT / "configs/demo.yml", ROOT / "calib_cache/demo/model.safetensors")
    scales = load_scales(ROOT / "calib_cache/demo/modiff-w8a8.safetensors", network, checkpoint.sha256)
    if backend == "native":
        denoiser = trained.native(network, checkpoint.params, scales)
    else:
        file = ROOT / "out/load_trials.onnx"
        save_onnx(file, build_onnx(network, checkpoint, None, "fp32", None))
        denoiser = exported.onnxruntime(load_onnx(file), scales.rows.timesteps)
    x = ImageNoise(0, range(batch), network.config.input_shape).draw()
    updates = Solver().updates(network.config.diffusion, scales.rows.timesteps)
    for _ in range(2):
        begin = time.perf_counter()
        sample_trajectory(denoiser, updates, x)
    return (time.perf_counter() - begin) / batch


def in_a_process(backend, batch):
    command = [sys.executable, __file__, "--measure", backend, str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main():
    seconds = {}
    for busy in BUSY:
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for batch in BATCHES:
                runs = {name: [] for name in ("native", "onnxruntime")}
                for _ in range(REPEATS):
                    for name, found in runs.items():
                        found.append(in_a_process(name, batch))
                seconds[f"{busy} busy, batch {batch}"] = {n: round(statistics.median(f), 3) for n, f in runs.items()}
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
    loss = {}
    for key, found in seconds.items():
        alone = seconds[f"0 busy, {key.split(', ')[1]}"]
        times = {name: found[name] / alone[name] for name in found}
        loss[key] = {**{n: round(t, 2) for n, t in times.items()}, "ratio": round(times["native"] / times["onnxruntime"], 2)}
    result = {
        "what": f"seconds an image, the demo model in 50 steps, median of {REPEATS}; native W8A8 and onnxruntime in float",
        "usable cores": usable_cores(),
        "seconds an image": seconds,
        "times as long as alone": loss,
        **provenance(),
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps({k: result[k] for k in ("seconds an image", "times as long as alone")}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        sys.stdout.write(f"{measure(sys.argv[2], int(sys.argv[3]))}\n")
    else:
        main()
