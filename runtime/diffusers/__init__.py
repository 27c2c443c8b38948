"""Quantized networks in the hands of diffusers' own pipelines, and a pipeline of a folder that `quantize` wrote."""

from modiff_trt.runtime.diffusers.pipeline import ModiffPipeline
from modiff_trt.runtime.diffusers.unet import ModiffUNet

__all__ = ["ModiffPipeline", "ModiffUNet"]
