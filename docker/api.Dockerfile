# The API: no torch, no device. Build from the repository root:  docker build -f docker/api.Dockerfile -t temper-api .
FROM python:3.11.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TEMPER_HOME=/var/lib/temper TEMPER_HOST=0.0.0.0 TEMPER_LOG_FORMAT=json

WORKDIR /opt/temper
COPY pyproject.toml README.md docker/constraints.txt ./
COPY core core
COPY api api
COPY worker worker
COPY migrations migrations
RUN pip install --constraint constraints.txt .

RUN useradd --uid 1000 --user-group --no-create-home temper && install -d -o temper -g temper /var/lib/temper
USER temper
VOLUME /var/lib/temper
EXPOSE 8400
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8400/healthz', timeout=4)"]
CMD ["temper", "api"]
