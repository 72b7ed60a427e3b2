# The harness on a GPU. CUDA's libraries come with torch's wheel; the host needs NVIDIA's driver and
# container toolkit. For an older driver give the index of torch's builds for an older CUDA.
#
#   docker build -t harness .
#   docker build -t harness --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" --user "$(id -u)" harness run --method ard --device cuda
FROM python:3.12-slim-bookworm

# torch.compile calls a C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# The newest torch of the index is meant.
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11" "torchvision>=0.26"

WORKDIR /opt/harness
COPY . .
# /work belongs to the host, so caches lie beside it and any user may write there.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[diffusers]" \
    && install -d -m 1777 /cache /work

ENV HARNESS_CACHE=/cache \
    HARNESS_DATA=/cache/data \
    HF_HOME=/cache/hub \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCH_HOME=/cache/torch
RUN useradd --uid 1000 --create-home user
USER 1000
WORKDIR /work
ENTRYPOINT ["harness"]
CMD ["--help"]
