"""Every Prometheus metric, declared once.

What a process counts itself (requests, streams) lives in `REGISTRY`; what the database knows (jobs, devices, loss) is read from
it at each scrape, so that any number of API processes tell the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from prometheus_client import CollectorRegistry, Gauge, Histogram, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import Job, Lease, Node
from core.specs.events import TRAINING_METRICS

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

HTTP_SECONDS = Histogram(
    "temper_http_request_duration_seconds",
    "Time from a request's arrival to the end of its answer, by route.",
    ["method", "route", "status"],
    registry=REGISTRY,
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
)
EVENT_STREAMS = Gauge("temper_event_streams", "Event streams that are open now.", registry=REGISTRY)

_STATES = ("waiting", "queued", "starting", "running", "cancelling", "succeeded", "failed", "cancelled")
_JOB_GAUGES = {
    name: (f"temper_job_{name.replace('_ms', '_milliseconds')}", f"Of a running training, last told: {text}")
    for name, text in TRAINING_METRICS.items()
}


def scrape(session: Session | None, *, now: datetime, node_ttl_s: float) -> bytes:
    """All metrics in Prometheus' text form; without a session, those of this process alone and `temper_database_up` 0."""
    cluster = CollectorRegistry()
    up = Gauge("temper_database_up", "1 when the database answers.", registry=cluster)
    up.set(session is not None)
    if session is not None:
        cluster.register(_Families(list(cluster_metrics(session, now=now, node_ttl_s=node_ttl_s))))
    return generate_latest(REGISTRY) + generate_latest(cluster)


def cluster_metrics(session: Session, *, now: datetime, node_ttl_s: float) -> Iterator[Metric]:
    """What the database knows: jobs by state, the queue's age, devices, and the last values of running jobs."""
    counts = dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).all())
    jobs = GaugeMetricFamily("temper_jobs", "Jobs by state.", labels=["state"])
    for state in _STATES:
        jobs.add_metric([state], counts.get(state, 0))
    yield jobs

    oldest = session.scalar(select(func.min(Job.queued_at)).where(Job.state == "queued"))
    age = (now - oldest).total_seconds() if oldest else 0.0
    yield GaugeMetricFamily(
        "temper_queue_age_seconds", "How long the oldest queued job has been queued.", value=max(0.0, age)
    )

    yield from _device_metrics(session, seen_after=now - timedelta(seconds=node_ttl_s))
    yield from _running_metrics(session)


def _device_metrics(session: Session, *, seen_after: datetime) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "temper_node_up", "1 when the host's worker was heard of lately and calls itself healthy.", labels=["node"]
    )
    drained = GaugeMetricFamily(
        "temper_node_drained", "1 when an operator took the host out of service.", labels=["node"]
    )
    total = GaugeMetricFamily("temper_devices", "Devices of a host.", labels=["node", "kind"])
    used = GaugeMetricFamily("temper_devices_in_use", "Devices that jobs hold.", labels=["node", "kind"])
    held: dict[str, int] = {}
    for node, devices in session.execute(select(Lease.node, Lease.devices).where(Lease.state != "released")):
        held[node] = held.get(node, 0) + len(devices)
    for node in session.scalars(select(Node).order_by(Node.name)):
        up.add_metric([node.name], node.healthy and node.last_seen_at > seen_after)
        drained.add_metric([node.name], node.drained)
        total.add_metric([node.name, node.device_kind], len(node.devices))
        used.add_metric([node.name, node.device_kind], held.get(node.name, 0))
    yield from (up, drained, total, used)


def _running_metrics(session: Session) -> Iterator[Metric]:
    running = session.execute(select(Job.id, Job.latest_metrics).where(Job.state.in_(("running", "cancelling")))).all()
    for metric, (name, text) in _JOB_GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=["job"])
        for job_id, latest in running:
            value = (latest or {}).get(metric)
            if isinstance(value, (int, float)):
                family.add_metric([job_id], value)
        yield family


class _Families(Collector):
    """Metrics that were computed already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Give them out."""
        yield from self._families
