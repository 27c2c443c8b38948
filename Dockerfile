# Native INT8 on an NVIDIA GPU, and TensorRT-RTX plans. Not built where this is developed: there is no Docker there.
#
#     docker build -t modiff-trt .
#     docker run --gpus all -v "$PWD/out:/work/out" modiff-trt sample --backend native --device cuda ... --out out/images
FROM python:3.12-slim
# Triton compiles a launcher with the C compiler when a kernel is first used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /src
# On Linux PyPI's torch is the CUDA build.
RUN pip install --no-cache-dir "torch==2.13.*" && pip install --no-cache-dir "/src[cuda,rtx]" "torch==2.13.*"
# Tuned convolution plans are kept here: mount it to keep them.
ENV MODIFF_TRT_CACHE=/cache
WORKDIR /work
ENTRYPOINT ["modiff-trt"]
