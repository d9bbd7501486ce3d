# syntax=docker/dockerfile:1
# Training and serving in containers. The code is in /app; everything that is read and written
# is in /runs, so mount a volume there.
#
#   docker build -t gpt2 .                             train, with CUDA
#   docker build -t gpt2-serve --target serve .        serve log/latest_checkpoint.pt
#   docker build -t gpt2 --build-arg TORCH=cpu .       train without CUDA, several GB smaller
#
# docs/cloud.md has the commands that run them.
FROM python:3.11.14-slim-bookworm AS base

# torch.compile needs a C++ compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=cuda
WORKDIR /app
COPY requirements.txt .
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
            "$(grep '^torch==' requirements.txt)"; \
    fi \
    && pip install --no-cache-dir -r requirements.txt

# the scripts, and the package that they share, with the page that serve.py serves
COPY *.py LICENSE ./
COPY gptlib gptlib
COPY benches benches

# torch names its cache folder after USER, which --user may leave without an entry in /etc/passwd
# hadolint ignore=DL3064
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 USER=gpt2 HOME=/tmp \
    TIKTOKEN_CACHE_DIR=/runs/cache/tiktoken HF_HOME=/runs/cache/huggingface
# every user may write to /runs, and to the folder where gptlib/training/scoring.py keeps HellaSwag
RUN useradd --uid 1000 --no-create-home gpt2 \
    && mkdir -m 1777 /runs /app/hellaswag
USER 1000
WORKDIR /runs
VOLUME /runs

FROM base AS serve
ENV HOST=0.0.0.0 PORT=5000
EXPOSE 5000
# /health answers 503, which counts as unhealthy, while the model loads or the server shuts down
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", \
        "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
CMD ["python", "/app/serve.py"]

FROM base AS train
CMD ["python", "/app/train_gpt2.py", "--preset", "demo"]
