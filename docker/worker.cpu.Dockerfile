# A worker without NPUs: conversion, data sets, tiny trainings. Build from the repository root:
#   docker build -f docker/worker.cpu.Dockerfile -t temper-worker-cpu .
FROM python:3.11.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TEMPER_HOME=/var/lib/temper TEMPER_DEVICE_KIND=cpu TEMPER_LOG_FORMAT=json

# For the CPU build on x86-64: --build-arg PIP_ARGS="--index-url …" with the index of your choice.
ARG PIP_ARGS=""
RUN pip install torch==2.13.0 ${PIP_ARGS}

WORKDIR /opt/temper
COPY pyproject.toml README.md docker/constraints.txt docker/worker_health.py ./
COPY core core
COPY api api
COPY worker worker
COPY migrations migrations
RUN pip install --constraint constraints.txt '.[train,video]'

RUN useradd --uid 1000 --user-group --no-create-home temper && install -d -o temper -g temper /var/lib/temper
USER temper
VOLUME /var/lib/temper
HEALTHCHECK --interval=30s --timeout=15s --start-period=30s --retries=3 CMD ["python", "/opt/temper/worker_health.py"]
CMD ["temper", "worker"]
