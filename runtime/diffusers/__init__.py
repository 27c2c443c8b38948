"""Quantized networks in the hands of diffusers' own pipelines, and a pipeline of a folder that `quantize` wrote."""
