"""The modulated convolution: reference, kernels for CUDA (Triton and cuDNN) and for CPUs (oneDNN)."""
