"""`temper`: the command line over the HTTP API, and the three commands that start the service.

Exit codes: 0 done, 1 the job failed or was cancelled (or a check did not pass), 2 wrong usage, 3 refused by the server,
4 no server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from api import terminal
from api.client import ApiError, Client, ClientError, Job
from api.transfer import TransferError

DEFAULT_HOME = Path("~/.temper")
DEFAULT_URL = "http://127.0.0.1:8400"

app = typer.Typer(
    help="Fine-tune Qwen2.5-VL on Ascend NPUs: convert, prepare data, train, evaluate, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(help="API keys (for administrators).", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
nodes_app = typer.Typer()
app.add_typer(nodes_app, name="nodes", rich_help_panel="Cluster")

out = Console()
err = Console(stderr=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="A job, as `temper jobs` shows it.")]
NodeName = Annotated[str, typer.Argument(metavar="NAME", help="A host, as `temper nodes` shows it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Kind = Annotated[
    str, typer.Option("--kind", "-k", help="hf_model, mm_checkpoint, hf_adapter, mm_adapter or dataset_source.")
]
Name = Annotated[str | None, typer.Option("--name", help="A name to recognise it by.")]


class UsageError(Exception):
    """The command line or a file that it names is wrong."""


@dataclass(frozen=True)
class Connection:
    """Where the server is and who we are."""

    url: str
    api_key: str | None
    home: Path

    def client(self) -> Client:
        return Client(self.url, self.api_key or self._embedded_key(), retry_s=5)

    def _embedded_key(self) -> str | None:
        """The key that `temper serve` wrote on this machine; used for a server on this machine only."""
        if httpx.URL(self.url).host not in {"127.0.0.1", "localhost", "::1"}:
            return None
        try:
            return (self.home.expanduser() / "admin.key").read_text().strip()
        except OSError:
            return None


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="TEMPER_URL", help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TEMPER_API_KEY", help="API key; that of HOME/admin.key if absent.", show_envvar=True),
    ] = None,
    home: Annotated[Path, typer.Option(envvar="TEMPER_HOME", help="Home of the embedded server.")] = DEFAULT_HOME,
) -> None:
    context.obj = Connection(url, api_key, home)


# The service


@app.command(rich_help_panel="Service")
def serve(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(help="Database, broker, artifacts, logs and admin.key live here.", show_default=str(DEFAULT_HOME)),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind to.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 = a free one.", show_default="8400")] = None,
    allow_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that artifacts may be registered from; may be given again."),
    ] = None,
) -> None:
    """Start everything on this machine: API and worker, nothing else to install (embedded mode)."""
    connection: Connection = context.obj
    import_module("api.serve").main(home=home or connection.home, host=host, port=port, allow_roots=allow_root or None)


@app.command("api", rich_help_panel="Service")
def serve_api(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to bind to.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port.", show_default="8400")] = None,
) -> None:
    """Start the API alone (cluster mode; PostgreSQL and Redis by TEMPER_DATABASE_URL and TEMPER_BROKER_URL)."""
    from core.settings import Settings

    connection: Connection = context.obj
    import_module("api.serve").run_api(Settings(home=connection.home), host=host, port=port)


@app.command(rich_help_panel="Service")
def worker(context: typer.Context) -> None:
    """Start the worker of this host (cluster mode; the same settings as the API's)."""
    connection: Connection = context.obj
    environment = {**os.environ, "TEMPER_HOME": str(connection.home)}
    os.execve(sys.executable, [sys.executable, "-m", "worker"], environment)  # noqa: S606  # api imports no worker


@app.command(rich_help_panel="Service")
def doctor(as_json: AsJson = False) -> None:
    """Check this Ascend host: driver, firmware, CANN, Python, torch; name the first thing wrong and what mends it."""
    from core.doctor import examine, look

    report = examine(look())
    if as_json:
        _print_json([check.model_dump() for check in report.checks])
    else:
        for check in report.checks:
            mark = {"ok": "[green]ok  [/]", "wrong": "[red]wrong[/]", "unknown": "[yellow]?   [/]"}[check.verdict]
            out.print(f"{mark} {check.name:<12} {escape(check.found)}", highlight=False)
        if report.first_wrong:
            out.print(f"\n[red]{escape(report.first_wrong.problem)}[/]", highlight=False)
            out.print(f"mend it: {escape(report.first_wrong.remedy)}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if report.first_wrong is None else 1)


# Jobs


@app.command(rich_help_panel="Jobs")
def submit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSON or YAML: {kind, spec, name?, …}, or several of them.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the jobs have finished.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit the jobs of a file. In a file with several, `job: $NAME` refers to the one of that name above it."""
    bodies = read_jobs(file)
    with _client(context) as client:
        jobs: list[Job] = []
        for body in bodies:
            body["spec"] = with_references(body["spec"], {job.name: job.id for job in jobs if job.name})
            try:
                jobs.append(client.submit(body.pop("kind"), body.pop("spec"), **body))
            except ClientError:
                if jobs:
                    ids = " ".join(job.id for job in jobs)
                    err.print(
                        f"job {len(jobs) + 1} of {file} was refused; those above it are submitted: {ids}",
                        soft_wrap=True,
                    )
                raise
            if not as_json:
                out.print(f"{jobs[-1].id}  {jobs[-1].kind}  {escape(jobs[-1].name or '')}", highlight=False)
                if not follow:  # where they come with the other events
                    _print_risks(jobs[-1])
        if follow:
            jobs = _follow_all(client, jobs)
        if as_json:
            _print_json([job.model_dump() for job in jobs])
        _exit_by_state(jobs)


@app.command(rich_help_panel="Jobs")
def plan(context: typer.Context, file: Annotated[Path, typer.Argument(help="JSON or YAML with one job.")]) -> None:
    """Say what a job would need and do; nothing is stored."""
    (body, *others) = read_jobs(file)
    if others:
        raise UsageError(f"{file} holds {len(others) + 1} jobs; a plan is for one")
    with _client(context) as client:
        _print_json(client.plan(body["kind"], body["spec"]))


@app.command(rich_help_panel="Jobs")
def jobs(
    context: typer.Context,
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    state: Annotated[str | None, typer.Option(help="Only this state.")] = None,
    label: Annotated[str | None, typer.Option(help="Only with this label (name or name=value).")] = None,
    user: Annotated[str | None, typer.Option(help="Only this user's (administrators see everybody's).")] = None,
    name: Annotated[str | None, typer.Option(help="Only of this name.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _client(context) as client:
        found = list(client.jobs(limit=limit, kind=kind, state=state, label=label, owner=user, name=name))
    if as_json:
        _print_json([job.model_dump() for job in found])
    else:
        out.print(terminal.jobs_table(found))


@app.command(rich_help_panel="Jobs")
def show(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job: state, progress, attempts, outputs, error."""
    with _client(context) as client:
        job = client.job(job_id)
    if as_json:
        _print_json(job.model_dump())
    else:
        out.print(terminal.job_details(job))


@app.command(rich_help_panel="Jobs")
def follow(context: typer.Context, job_id: JobId) -> None:
    """Show a job's progress, loss and tokens per second until it has finished."""
    with _client(context) as client:
        _exit_by_state(_follow_all(client, [client.job(job_id)]))


@app.command(rich_help_panel="Jobs")
def logs(
    context: typer.Context,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has finished.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, help="Only the last lines.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt; the latest if absent.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Of this rank alone.")] = None,
) -> None:
    """Print a job's log."""
    with _client(context) as client:
        offset = 0
        if tail is not None:
            chunk = client.logs(job_id, tail=tail, attempt=attempt, rank=rank)
            _write(chunk.content)
            offset = chunk.next_offset
        if tail is None or follow:
            for piece in client.follow_logs(job_id, offset=offset, attempt=attempt, rank=rank, follow=follow):
                _write(piece)
        if follow:
            _exit_by_state([client.job(job_id)])


@app.command(rich_help_panel="Jobs")
def metrics(
    context: typer.Context,
    job_id: JobId,
    names: Annotated[list[str] | None, typer.Argument(help="Only these, e.g. loss.")] = None,
    since_step: Annotated[int | None, typer.Option(help="Only later steps.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a training's metrics: loss, tokens per second, …; with --json every point."""
    with _client(context) as client:
        series = client.metrics(job_id, names=names, since_step=since_step)
    if as_json:
        _print_json(series)
    else:
        out.print(terminal.series_table(series))


@app.command(rich_help_panel="Jobs")
def cancel(context: typer.Context, job_id: JobId) -> None:
    """Cancel a job; a training writes a last checkpoint first."""
    with _client(context) as client:
        _print_state(client.cancel(job_id))


@app.command(rich_help_panel="Jobs")
def retry(context: typer.Context, job_id: JobId) -> None:
    """Give a failed or cancelled job another attempt."""
    with _client(context) as client:
        _print_state(client.retry(job_id))


# Artifacts


@app.command(rich_help_panel="Artifacts")
def upload(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(exists=True, help="A file, an archive, or a folder (sent as a tar).")],
    kind: Kind,
    name: Name = None,
    resume: Annotated[str | None, typer.Option(help="An upload that broke off (upl_…).")] = None,
    as_json: AsJson = False,
) -> None:
    """Send a file or folder to the server and make an artifact of it."""
    started: list[str] = []
    with _client(context) as client, terminal.transfer_bar(err, "sending") as told:
        try:
            artifact = client.upload(kind, path, name=name, resume=resume, on_bytes=told, on_start=started.append)
        except (ClientError, KeyboardInterrupt):
            if started:
                err.print(f"to go on: temper upload {path} --kind {kind} --resume {started[0]}", soft_wrap=True)
            raise
    _print_artifact(artifact, as_json=as_json)


@app.command(rich_help_panel="Artifacts")
def register(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A folder that the server sees, under one of its allowed roots.")],
    kind: Kind,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Make an artifact of a folder on the server's file system; nothing is copied."""
    with _client(context) as client:
        _print_artifact(client.register(kind, path.absolute(), name=name), as_json=as_json)


@app.command(rich_help_panel="Artifacts")
def download(
    context: typer.Context,
    artifact_id: Annotated[str, typer.Argument(metavar="ARTIFACT", help="art_…, as `temper show` prints it.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put the files.")],
) -> None:
    """Fetch an artifact; goes on where an earlier try stopped, and verifies every file."""
    with _client(context) as client, terminal.transfer_bar(err, "fetching") as told:
        report = client.download(artifact_id, folder, on_bytes=told)
    checked = report.files - len(report.unverified)
    sizes = f"{decimal(report.size)}, of which {decimal(report.fetched_bytes)} came now"
    out.print(
        f"{report.files} files ({sizes}) in {folder}; {checked} verified by SHA-256", highlight=False, soft_wrap=True
    )


@app.command(rich_help_panel="Artifacts")
def artifacts(
    context: typer.Context,
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List artifacts, newest first."""
    with _client(context) as client:
        found = list(client.artifacts(limit=limit, kind=kind))
    if as_json:
        _print_json([artifact.model_dump() for artifact in found])
    else:
        out.print(terminal.artifacts_table(found))


@app.command(rich_help_panel="Artifacts")
def delete(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="art_… or job_…, one or several.")],
    artifacts: Annotated[bool, typer.Option("--artifacts", help="With a job also the artifacts that it made.")] = False,
) -> None:
    """Delete artifacts with their files, and finished jobs; refused while a job needs one. What was registered stays where it lies."""
    with _client(context) as client:
        for name in ids:
            if name.startswith("job_"):
                client.delete_job(name, artifacts=artifacts)
            else:
                client.delete_artifact(name)
            out.print(f"{name} is deleted", highlight=False)


# The cluster


@app.command(rich_help_panel="Cluster")
def families(context: typer.Context) -> None:
    """Print the model families, their sizes and legal splits."""
    with _client(context) as client:
        _print_json([family.model_dump() for family in client.families()])


@nodes_app.callback(invoke_without_command=True)
def nodes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the hosts with what is free there; drain, resume or forget one (for administrators)."""
    if context.invoked_subcommand is not None:
        return
    with _client(context) as client:
        found = client.nodes()
    if as_json:
        _print_json([node.model_dump() for node in found])
    else:
        out.print(terminal.nodes_table(found))


@nodes_app.command("drain")
def drain_node(context: typer.Context, name: NodeName) -> None:
    """Take a host out of service: it gets no new jobs, running ones go on."""
    with _client(context) as client:
        node = client.drain_node(name).model_dump()
    jobs = sorted({device["job_id"] for device in node["devices"] if device["in_use"]})
    told = f"still running there: {', '.join(jobs)}" if jobs else "no job holds a device there"
    out.print(f"{name} is drained; {told}", highlight=False, soft_wrap=True)


@nodes_app.command("resume")
def resume_node(context: typer.Context, name: NodeName) -> None:
    """Put a drained host back into service."""
    with _client(context) as client:
        client.resume_node(name)
    out.print(f"{name} takes jobs again", highlight=False)


@nodes_app.command("forget")
def forget_node(context: typer.Context, name: NodeName) -> None:
    """Forget a host that is gone for good."""
    with _client(context) as client:
        client.forget_node(name)


@app.command(rich_help_panel="Cluster")
def queue(context: typer.Context) -> None:
    """Print what waits, and for what."""
    with _client(context) as client:
        _print_json(client.queue())


@keys_app.command("list")
def list_keys(context: typer.Context) -> None:
    """List keys; their secrets are not stored."""
    with _client(context) as client:
        _print_json([key.model_dump() for key in client.api_keys()])


@keys_app.command("create")
def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    user: Annotated[str | None, typer.Option(help="Whose it is; jobs belong to users. Yours if absent.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May manage keys and see every job.")] = False,
) -> None:
    """Make a key and print it, this once."""
    with _client(context) as client:
        _print_json(client.create_key(name, user=user, role="admin" if admin else "user").model_dump())


@keys_app.command("delete")
def delete_key(context: typer.Context, key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Make a key invalid."""
    with _client(context) as client:
        client.delete_key(key_id)


# Job files


def read_jobs(file: Path) -> list[dict[str, Any]]:
    """The job bodies of a JSON or YAML file (one, a list, or several YAML documents); UsageError says what is wrong."""
    try:
        documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))  # JSON is YAML
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is neither JSON nor YAML: {error}") from error
    bodies = [body for document in documents for body in (document if isinstance(document, list) else [document])]
    allowed = {"kind", "spec", "name", "labels", "priority", "max_attempts"}
    for number, body in enumerate(bodies, 1):
        if not isinstance(body, dict) or not {"kind", "spec"} <= body.keys():
            raise UsageError(f"job {number} of {file} needs `kind` and `spec`")
        if unknown := body.keys() - allowed:
            raise UsageError(f"job {number} of {file} has unknown {sorted(unknown)}; it may have {sorted(allowed)}")
    if not bodies:
        raise UsageError(f"{file} holds no job")
    return bodies


def with_references(value: Any, ids: Mapping[str, str]) -> Any:
    """A copy of a spec in which every `job: $NAME` carries the id of the job of that name."""
    if isinstance(value, list):
        return [with_references(item, ids) for item in value]
    if not isinstance(value, dict):
        return value
    reference = value.get("job")
    if isinstance(reference, str) and reference.startswith("$"):
        if reference[1:] not in ids:
            raise UsageError(f"no job named {reference[1:]!r} above this one; there are {sorted(ids) or 'none'}")
        return {**value, "job": ids[reference[1:]]}
    return {key: with_references(item, ids) for key, item in value.items()}


# Printing


def _client(context: typer.Context) -> Client:
    connection: Connection = context.find_root().obj
    return connection.client()


def _follow_all(client: Client, jobs: list[Job]) -> list[Job]:
    try:
        with terminal.job_views(err) as progress:
            return [terminal.follow(client, job.id, err, progress) for job in jobs]
    except KeyboardInterrupt:
        unfinished = [job.id for job in jobs if not client.job(job.id).finished]
        err.print(f"no longer following; still going: {' '.join(unfinished)} (stop with `temper cancel ID`)")
        raise typer.Exit(130) from None


def _print_risks(job: Job) -> None:
    """Why the job may fail when it runs."""
    for risk in job.risks:
        err.print(f"  [yellow]warning:[/] {escape(risk)}", highlight=False, soft_wrap=True)


def _exit_by_state(jobs: list[Job]) -> None:
    if any(job.state in {"failed", "cancelled"} for job in jobs):
        raise typer.Exit(1)


def _print_state(job: Job) -> None:
    out.print(f"{job.id}  {terminal.coloured_state(job.state)}", highlight=False)


def _print_artifact(artifact: BaseModel, *, as_json: bool) -> None:
    if as_json:
        _print_json(artifact.model_dump())
    else:
        out.print(artifact.model_dump()["id"], highlight=False)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _complaint(error: Exception) -> Iterator[str]:
    """The lines that tell a user what went wrong: the message, each refused field, the hint."""
    yield str(error)
    if isinstance(error, ApiError):
        for item in error.errors:
            place = ".".join(str(part) for part in item.get("loc", ()))
            told = f"{place}: {item.get('message')}"
            if not str(error).startswith(told):
                yield f"  {told}"
    hint = getattr(error, "hint", None)
    if hint:
        yield f"hint: {hint}"
    if isinstance(error, ApiError) and error.status >= httpx.codes.INTERNAL_SERVER_ERROR:
        yield f"request id: {error.request_id}"


def main() -> None:
    """Entry point: runs a command, and turns what the server or the user got wrong into a message and an exit code."""
    try:
        app()
    except (ClientError, TransferError, UsageError) as error:
        first, *rest = _complaint(error)
        err.print(f"[red]temper:[/] {escape(first)}", highlight=False, soft_wrap=True)
        for line in rest:
            err.print(escape(line), highlight=False, soft_wrap=True)
        if isinstance(error, UsageError | TransferError):
            raise SystemExit(2) from None
        refused = isinstance(error, ApiError) and error.status < httpx.codes.INTERNAL_SERVER_ERROR
        raise SystemExit(3 if refused else 4) from None


if __name__ == "__main__":
    main()
