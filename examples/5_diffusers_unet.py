"""A quantized network in a stock diffusers pipeline.

    modiff-trt quantize --model ddpm-cifar10-32 --timesteps 50 --out q      # a local folder, as save_pretrained writes it
    python examples/5_diffusers_unet.py ddpm-cifar10-32 q/scales.safetensors

The pipeline stays diffusers' own: its scheduler, its guidance, its autoencoder. Stable Diffusion's is used in the same way.
"""

import sys

import diffusers

from modiff_trt.diffusers import ModiffUNet

folder, scales = sys.argv[1:]
pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
pipe = diffusers.DDIMPipeline(pipe.unet, pipe.scheduler)
pipe.unet = ModiffUNet.from_pretrained(folder, scales)
image = pipe(batch_size=1, num_inference_steps=len(pipe.unet.timesteps)).images[0]
print(f"an image of {image.size[0]}x{image.size[1]} pixels in {len(pipe.unet.timesteps)} steps of INT8")
