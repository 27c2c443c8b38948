"""An exported file with onnxruntime and numpy, and nothing of this project: what a program in another language would do.

    modiff-trt export --config F.yml --ckpt F --scales F --out network.onnx
    python examples/3_onnxruntime_alone.py network.onnx

The manifest is JSON under the metadata key `modiff.manifest`. It has the timesteps, the multipliers of every pass, and each
layer's `o_hat` at the start. (`a_hat` starts at zero here. With `dither`, which this example leaves out, it starts from an
offset: `core/dither.py`.)
"""

import base64
import json
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
manifest = json.loads(session.get_modelmeta().custom_metadata_map["modiff.manifest"])


def decode(text):
    return np.frombuffer(base64.b64decode(text), np.float32)


warmup, timesteps, layers = manifest["warmup"], manifest["timesteps"], manifest["modulated"]
multipliers = decode(manifest["multipliers"]).reshape(warmup + len(timesteps), len(layers))
diffusion = manifest["config"]["diffusion"]
betas = np.linspace(diffusion["beta_start"], diffusion["beta_end"], diffusion["num_diffusion_timesteps"])
alpha_bar = np.append(np.cumprod(1 - betas), 1.0)  # the last entry is where the last step arrives

shapes = {i.name: i.shape[1:] for i in session.get_inputs()}
x = np.random.default_rng(0).standard_normal((1, *shapes["x"])).astype(np.float32)
state = {}
for layer in layers:
    bias = decode(manifest["o_hat_start"][layer])[:, None, None]
    state[f"a_hat.{layer}"] = np.zeros((1, *shapes[f"a_hat.{layer}"]), np.float32)
    state[f"o_hat.{layer}"] = np.broadcast_to(bias, (1, *shapes[f"o_hat.{layer}"])).astype(np.float32)

names = [output.name for output in session.get_outputs()]
passes = [timesteps[0]] * warmup + timesteps
for row, t in enumerate(passes):
    feed = {"x": x, "t": np.asarray([t], np.int64), "row_scale": multipliers[row], **state}
    found = dict(zip(names, session.run(None, feed), strict=True))
    state = {name: found[name.replace("_hat.", "_hat_out.", 1)] for name in state}
    if row >= warmup:
        following = passes[row + 1] if row + 1 < len(passes) else -1
        now, after = alpha_bar[t], alpha_bar[following]
        x0 = (x - np.sqrt(1 - now) * found["eps"]) / np.sqrt(now)
        x = (np.sqrt(after) * x0 + np.sqrt(1 - after) * found["eps"]).astype(np.float32)
print(f"an image of {x.shape[1:]}, between {x.min():.2f} and {x.max():.2f}")
