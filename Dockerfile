# syntax=docker/dockerfile:1
# Training and serving in containers; the code is in /app, all that is read and written in /runs (mount a volume there).
#
#   docker build -t gpt2 .                                    trains (CUDA: what PyPI has for Linux)
#   docker build -t gpt2-serve --target serve .               serves log/latest_checkpoint.pt, with a health check
#   docker build -t gpt2 --build-arg TORCH=cpu .              the same without CUDA, several GB smaller
FROM python:3.11.14-slim-bookworm AS base

# torch.compile builds its kernels with a C++ compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=cuda
WORKDIR /app
COPY requirements.txt .
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)"; \
    fi \
    && pip install --no-cache-dir -r requirements.txt

COPY *.py LICENSE ./
COPY gptlib gptlib

# USER: torch names its cache by it, also where --user gives a number that /etc/passwd doesn't know
# hadolint ignore=DL3064
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 USER=gpt2 HOME=/tmp \
    TIKTOKEN_CACHE_DIR=/runs/cache/tiktoken HF_HOME=/runs/cache/huggingface
# any user may write to what isn't a volume: hellaswag.py keeps its download beside itself
RUN useradd --uid 1000 --no-create-home gpt2 \
    && mkdir -m 1777 /runs /app/hellaswag
USER 1000
WORKDIR /runs
VOLUME /runs

FROM base AS serve
ENV HOST=0.0.0.0 PORT=5000
EXPOSE 5000
# 503, and so unhealthy, while the model is loading and while the server drains
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
CMD ["python", "/app/serve.py"]

FROM base AS train
CMD ["python", "/app/train_gpt2.py", "--preset", "demo"]
