# Training and serving in containers. The code is in /app; everything that is read and written
# is in /runs, so mount a volume there.
#
#   docker build -t gpt2 .                             train, with CUDA 13: a driver from 580 on
#   docker build -t gpt2 --build-arg TORCH=cu126 .     with CUDA 12.6: a driver from 525 on
#   docker build -t gpt2 --build-arg TORCH=cpu .       train without CUDA, several GB smaller
#   docker build -t gpt2-serve --target serve .        serve log/latest_checkpoint.pt
#
# docs/cloud.md has the commands that run them.

# the packages that serving needs; tini, since process 1 ignores SIGTERM until Python handles it
FROM python:3.11.14-slim-bookworm AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 tini \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH=
WORKDIR /app
COPY requirements.txt .
RUN if [ -n "$TORCH" ]; then \
        pip install --no-cache-dir --no-deps --index-url "https://download.pytorch.org/whl/$TORCH" \
            "$(grep '^torch==' requirements.txt)"; \
    fi \
    && grep -vE "^(datasets|pyarrow|matplotlib|gguf)=" requirements.txt > serving.txt \
    && pip install --no-cache-dir -r serving.txt \
    && rm -rf /usr/local/lib/python3.11/site-packages/torch/test
# torch names its cache folder after USER, which --user may leave without an entry in /etc/passwd
# hadolint ignore=DL3064
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 USER=gpt2 HOME=/tmp \
    TIKTOKEN_CACHE_DIR=/runs/cache/tiktoken HF_HOME=/runs/cache/huggingface \
    HELLASWAG_CACHE_DIR=/runs/cache/hellaswag
RUN useradd --uid 1000 --no-create-home gpt2 \
    && mkdir -m 1777 /runs
ENTRYPOINT ["tini", "-s", "--"]

# the scripts, and the package that they share, with the page that serve.py serves
FROM scratch AS code
COPY *.py LICENSE ./
COPY gptlib gptlib
COPY benches benches

# all packages, the C++ compiler that torch.compile needs, and the compiled product with 8-bit weights
FROM base AS full
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir -r requirements.txt
COPY --from=code / /app
RUN python -c "from gptlib.inference.int8.kernel import compile_kernel; compile_kernel('/app/int8')"
ENV TORCH_EXTENSIONS_DIR=/app/int8

FROM base AS serve
COPY --from=code / /app
COPY --from=full /app/int8 /app/int8
ENV TORCH_EXTENSIONS_DIR=/app/int8 HOST=0.0.0.0 PORT=5000
USER 1000
WORKDIR /runs
VOLUME /runs
EXPOSE 5000
# /health answers 503, which counts as unhealthy, while the model loads or the server shuts down
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", \
        "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
CMD ["python", "/app/serve.py"]

FROM full AS train
ARG COMMIT=
ENV GIT_COMMIT=$COMMIT
USER 1000
WORKDIR /runs
VOLUME /runs
CMD ["python", "/app/train_gpt2.py", "--preset", "demo"]
