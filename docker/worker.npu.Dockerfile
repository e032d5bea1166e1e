# The worker of an Ascend host (Atlas A2, 910B). Build from the repository root:
#   docker build -f docker/worker.npu.Dockerfile -t temper-worker-npu .
# Driver and firmware belong to the host and are mounted; CANN toolkit, kernels and nnal are those of the base image. CANN, torch
# and torch_npu are bound to one another: change all of them together, or none.
FROM quay.io/ascend/cann:8.2.rc1-910b-ubuntu22.04-py3.11

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TEMPER_HOME=/var/lib/temper TEMPER_DEVICE_KIND=npu TEMPER_LOG_FORMAT=json

RUN pip install torch==2.7.1 \
 && pip install torch_npu==2.7.1 pyyaml numpy decorator attrs scipy psutil

WORKDIR /opt/temper
COPY pyproject.toml README.md docker/constraints.txt docker/worker_health.py docker/with_cann.sh ./
COPY core core
COPY api api
COPY worker worker
COPY migrations migrations
RUN pip install --constraint constraints.txt '.[train,video]'

RUN useradd --uid 1000 --user-group --no-create-home temper && install -d -o temper -g temper /var/lib/temper
USER temper
VOLUME /var/lib/temper
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 CMD ["python", "/opt/temper/worker_health.py"]
ENTRYPOINT ["bash", "/opt/temper/with_cann.sh"]
CMD ["temper", "worker"]
