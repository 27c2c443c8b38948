"""A folder that `quantize` wrote, called as a diffusers pipeline is. It runs on onnxruntime, without torch.

python examples/6_quantized_folder.py q
"""

import sys

import numpy as np

from modiff_trt.diffusers import ModiffPipeline

pipe = ModiffPipeline.from_pretrained(sys.argv[1])
images = pipe(batch_size=2, generator=np.random.default_rng(0)).images
print(f"{len(images)} images of {images[0].size[0]}x{images[0].size[1]} pixels")
