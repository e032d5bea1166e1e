"""How jobs, artifacts and transfers look in a terminal; without one, plain lines that a log can hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from api.client import Artifact, Client, Event, Job, Resource
from api.transfer import OnBytes

_COLOURS = {
    "waiting": "dim",
    "queued": "cyan",
    "starting": "cyan",
    "running": "blue",
    "cancelling": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}
_PLAIN_INTERVAL_S = 2.0


def coloured_state(state: str) -> str:
    return f"[{_COLOURS.get(state, 'white')}]{state}[/]"


def age(stamp: str | None) -> str:
    """How long ago an RFC 3339 time was: 5 s, 12 min, 3 h, 2 d."""
    if not stamp:
        return ""
    elapsed_s = (datetime.now(timezone.utc) - _parse_time(stamp)).total_seconds()
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if elapsed_s >= size_s:
            return f"{elapsed_s / size_s:.0f} {unit}"
    return f"{max(elapsed_s, 0):.0f} s"


def duration_s(job: Job) -> float | None:
    """Seconds from the job's first start to its end; None while it has not both."""
    if not job.started_at or not job.finished_at:
        return None
    return (_parse_time(job.finished_at) - _parse_time(job.started_at)).total_seconds()


def _parse_time(stamp: str) -> datetime:
    moment = datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _table(*names: str) -> Table:
    """A table whose first column, an id, stays whole however narrow the terminal is: it is there to be copied."""
    first, *others = names
    return Table(Column(first, min_width=30, no_wrap=True), *others, box=None, pad_edge=False)


def jobs_table(jobs: Sequence[Job]) -> Table:
    """One line per job; whose it is where they are several people's, and how far where one is on its way."""
    columns: dict[str, Callable[[Job], str]] = {
        "id": lambda job: job.id,
        "kind": lambda job: job.kind,
        "name": lambda job: escape(job.name or ""),
        "user": lambda job: escape(job.owner or ""),
        "state": lambda job: coloured_state(job.state),
        "progress": progress_text,
        "created": lambda job: age(job.created_at),
    }
    if len({job.owner for job in jobs}) < 2:
        del columns["user"]
    if not any(progress_text(job) for job in jobs):
        del columns["progress"]
    table = _table(*columns)
    for job in jobs:
        table.add_row(*(text(job) for text in columns.values()))
    return table


def progress_text(job: Job) -> str:
    if job.progress is None or job.finished:
        return ""
    return count_text(job.progress.done, job.progress.total, job.progress.unit)


def count_text(done: float, total: float | None, unit: str) -> str:
    """How far something is, in its unit: 12/300 steps, 1.2 MB/3.4 GB."""
    if unit == "bytes":
        return f"{decimal(int(done))}/{decimal(int(total))}" if total else decimal(int(done))
    return f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"


def job_details(job: Job) -> Table:
    """Everything worth knowing of one job; the error and its hint last."""
    table = Table.grid("", "", padding=(0, 2))
    rows: list[tuple[str, str]] = [("id", job.id), ("kind", job.kind), ("name", escape(job.name or ""))]
    rows += [("state", coloured_state(job.state) + (f"  [dim]{escape(job.reason)}[/]" if job.reason else ""))]
    rows += [("labels", escape(", ".join(f"{key}={value}" for key, value in job.labels.items())))]
    rows += [("created", job.created_at or ""), ("started", job.started_at or ""), ("finished", job.finished_at or "")]
    rows += [("risk", f"[yellow]{escape(risk)}[/]") for risk in job.risks]
    left = job.progress.remaining_s if job.progress is not None and not job.finished else None
    more = f", {timedelta(seconds=round(left))} left" if left is not None else ""
    rows += [("progress", progress_text(job) + more), ("metrics", metrics_text(job.latest_metrics))]
    for attempt in job.attempts:
        hosts = escape("; ".join(_host_text(part) for part in attempt.placement))
        rows.append((f"attempt {attempt.number}", f"{coloured_state(attempt.state)}  [dim]{hosts}[/]"))
    rows += [("output", f"{escape(output.name)}  {output.artifact_id}") for output in job.outputs]
    if job.error:
        rows += [("error", f"[red]{escape(job.error.message)}[/]  [dim]{job.error.code}[/]")]
        rows += [("hint", escape(job.error.hint or ""))]
    for name, value in rows:
        if value:
            table.add_row(f"[bold]{name}[/]", value)
    return table


def _host_text(part: Mapping[str, Any]) -> str:
    devices = ", ".join(str(device) for device in part.get("devices") or ())
    return f"on {part.get('node')}" + (f", devices {devices}" if devices else "")


def nodes_table(nodes: Iterable[Resource]) -> Table:
    """One line per host; the last column says what is wrong with it."""
    table = Table("name", "state", "devices", "free", "jobs", "version", "", box=None, pad_edge=False)
    for node in nodes:
        row = node.model_dump()
        devices = row["devices"]
        state = _node_state(row)
        free = sum(device["healthy"] and not device["in_use"] for device in devices)
        jobs = {device["job_id"] or "another user's" for device in devices if device["in_use"]}
        colour = "green" if state == "ready" else "yellow" if state == "drained" else "red"
        count = f"{len(devices)} {row['device_kind']}"
        table.add_row(
            escape(row["name"]), f"[{colour}]{state}[/]", count, str(free), ", ".join(sorted(jobs)), row["version"],
            escape(row["reason"] or ""),
        )  # fmt: skip
    return table


def _node_state(node: Mapping[str, Any]) -> str:
    if not node["alive"]:
        return f"silent for {age(node['last_seen_at'])}"
    if not node["healthy"]:
        return "unhealthy"
    return "drained" if node["drained"] else "ready"


def artifacts_table(artifacts: Iterable[Artifact]) -> Table:
    table = _table("id", "kind", "name", "size", "created")
    for artifact in artifacts:
        size = decimal(artifact.size_bytes)
        table.add_row(artifact.id, artifact.kind, escape(artifact.name or ""), size, age(artifact.created_at))
    return table


_WATCHED = (
    ("loss", "loss {:.4f}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("grad_norm", "grad norm {:.2f}"),
    ("learning_rate", "lr {:.1e}"),
)


def metrics_text(metrics: Mapping[str, Any], *, most: int = len(_WATCHED)) -> str:
    """The few values that are watched while a model trains; the first `most` of them."""
    values = ((form, metrics.get(name)) for name, form in _WATCHED[:most])
    return "  ".join(form.format(value) for form, value in values if isinstance(value, (int, float)))


def series_table(series: Mapping[str, list[tuple[int, Any, float | None]]]) -> Table:
    """One line per metric: how many points, and where they went."""
    table = Table("metric", "points", "last step", "first", "last", "least", "most", box=None, pad_edge=False)
    for name, points in series.items():
        values = [value for _, _, value in points if value is not None]
        if values:
            ends = (values[0], values[-1], min(values), max(values))
            shown = (decimal(int(value)) if name.endswith("_bytes") else f"{value:.6g}" for value in ends)
            table.add_row(name, str(len(points)), str(points[-1][0]), *shown)
    return table


class JobView:
    """One job, live: a progress line that events move, and lasting lines for what should stay readable above it."""

    def __init__(self, console: Console, progress: Progress, task: TaskID, title: str) -> None:
        self._console, self._progress, self._task, self._title = console, progress, task, title
        self._metrics: dict[str, Any] = {}
        self._plain_time = 0.0
        self._state = ""

    def show(self, event: Event) -> None:
        data = event.data
        match event.type:
            case "state":
                self._show_state(str(data.get("state", "")), data.get("reason"))
            case "progress":
                done, total = data.get("done", 0), data.get("total")
                self._progress.update(self._task, completed=done, total=total, count=_count(data))
                self._plain(_count(data))
            case "metric":
                self._metrics.update(data.get("values") or {})
                self._progress.update(self._task, metrics=metrics_text(self._metrics, most=2))
                self._plain(f"step {data.get('step')}  {metrics_text(self._metrics)}")
            case "warning":
                self._console.print(f"{self._title}  [yellow]warning[/] {escape(str(data.get('message')))}")
            case _:
                pass

    def finish(self, job: Job) -> None:
        """The last line of a job; with the reason when it did not succeed."""
        self._show_state(job.state, None)
        if job.state == "succeeded":
            self._progress.update(self._task, completed=1, total=1, count="")
        if job.error:
            self._console.print(f"{self._title}  [red]{escape(job.error.message)}[/]")
            if job.error.hint:
                self._console.print(f"{self._title}  [dim]hint:[/] {escape(job.error.hint)}")

    def _show_state(self, state: str, reason: object) -> None:
        if not state or state == self._state:
            return
        self._state = state
        self._progress.update(self._task, state=coloured_state(state))
        if not self._console.is_terminal:
            self._console.print(f"{self._title}  {state}" + (f"  ({reason})" if reason else ""), highlight=False)

    def _plain(self, text: str) -> None:
        """Without a terminal: a line now and then."""
        now = time.monotonic()
        if not self._console.is_terminal and now - self._plain_time >= _PLAIN_INTERVAL_S:
            self._plain_time = now
            self._console.print(f"{self._title}  {text}", highlight=False)


def _count(progress: Mapping[str, Any]) -> str:
    return count_text(progress.get("done") or 0, progress.get("total"), str(progress.get("unit", "")))


@contextmanager
def job_views(console: Console) -> Iterator[Progress]:
    """The area in which the lines of `follow` move; several jobs can share it."""
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[state]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("[bold]{task.fields[metrics]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def follow(client: Client, job_id: str, console: Console, progress: Progress, *, title: str | None = None) -> Job:
    """Show a job until it has finished; the finished job."""
    job = client.job(job_id)
    shown = title or f"{job.kind} {escape(job.name or job.id)}"
    task = progress.add_task(shown, total=None, state=coloured_state(job.state), count="", metrics="")
    view = JobView(console, progress, task, shown)
    for event in client.events(job_id):
        view.show(event)
    job = client.job(job_id)
    view.finish(job)
    progress.stop_task(task)
    return job


@contextmanager
def transfer_bar(console: Console, title: str) -> Iterator[OnBytes]:
    """A progress bar for bytes; yields what a transfer calls."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def told(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {escape(name)}")

        yield told
