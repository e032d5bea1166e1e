"""Jobs: plan, submit, list, get, cancel, retry, delete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, BackgroundTasks, Body, Depends, Query, Response
from pydantic import AwareDatetime, Field
from sqlalchemy.orm import Session

from api import examples, queries
from api.deps import After, DatabaseDep, Limit, PrincipalDep, SettingsDep, StoreDep
from api.idempotency import Answer, Once, OnceDep, once
from api.problems import responses
from api.schemas import JobOut, JobStateName, Page, page
from core.errors import InvalidTransition
from core.jobs import queue, service
from core.jobs.planning import Plan
from core.specs import JobKind
from core.specs.request import JobRequest

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
log = structlog.get_logger(__name__)

_RACES = 3

JobBody = Annotated[JobRequest, Body(openapi_examples=examples.JOBS)]
Label = Annotated[str, Field(min_length=1, max_length=320, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}(=[^\x00]*)?$")]


@router.post("", status_code=201, response_model=JobOut, responses=responses(400, 404, 409, 413))
def submit_job(
    request: JobBody,
    once: OnceDep,
    principal: PrincipalDep,
    settings: SettingsDep,
    store: StoreDep,
    background: BackgroundTasks,
) -> Response:
    """Submit a job. It is refused at once, with reasons, when it cannot run; otherwise it stands in line."""

    def effect(session: Session) -> Answer:
        job = service.submit(session, settings=settings, store=store, principal=principal, request=request)
        return Answer(201, queries.job_out(session, job), {"Location": f"/v1/jobs/{job.id}"})

    background.add_task(queue.kick, settings)
    return once.run(effect)


@router.post("/plan", response_model=Plan, dependencies=[Depends(once)], responses=responses(400, 404, 409, 413))
def plan_job(
    request: JobBody,
    principal: PrincipalDep,
    settings: SettingsDep,
    store: StoreDep,
    database: DatabaseDep,
) -> Plan:
    """Say what the job would need and do, or why it cannot run. Nothing is stored, so an `Idempotency-Key` changes nothing."""
    with database.read() as session:
        return service.plan(session, settings=settings, store=store, principal=principal, request=request)


@router.get("", response_model=Page[JobOut], responses=responses())
def list_jobs(
    principal: PrincipalDep,
    database: DatabaseDep,
    kind: Annotated[list[JobKind] | None, Query(description="Of this kind; may be given again.")] = None,
    state: Annotated[list[JobStateName] | None, Query(description="In this state; may be given again.")] = None,
    label: Annotated[
        list[Label] | None, Query(description="`key=value`, or `key`; may be given again, all must hold.")
    ] = None,
    owner: Annotated[str | None, Query(max_length=200, description="Of this user; admins see everybody's.")] = None,
    name: Annotated[str | None, Query(max_length=200, description="Of this name.")] = None,
    created_after: Annotated[AwareDatetime | None, Query(description="RFC 3339, with a zone.")] = None,
    created_before: Annotated[AwareDatetime | None, Query(description="RFC 3339, with a zone.")] = None,
    after: After = None,
    limit: Limit = 50,
) -> dict[str, Any]:
    """Your jobs (an admin's: all), newest first."""
    wanted = queries.JobFilter(kind or (), state or (), label or (), owner, name, created_after, created_before)
    with database.read() as session:
        found = queries.find_jobs(session, principal, wanted, after=after, limit=limit)
        return page(queries.jobs_out(session, found), limit, lambda job: job.id)


@router.get("/{job_id}", response_model=JobOut, responses=responses(404))
def get_job(job_id: str, principal: PrincipalDep, database: DatabaseDep) -> JobOut:
    """One job, with its attempts, inputs and outputs."""
    with database.read() as session:
        return queries.job_out(session, service.get_job(session, principal, job_id))


@router.post("/{job_id}/cancel", response_model=JobOut, responses=responses(404, 409))
def cancel_job(
    job_id: str, once: OnceDep, principal: PrincipalDep, settings: SettingsDep, background: BackgroundTasks
) -> Response:
    """Stop a job. A training writes a last checkpoint first. Cancelling it again changes nothing."""

    def effect(session: Session) -> Answer:
        job = service.cancel(session, service.get_job(session, principal, job_id))
        return Answer(200, queries.job_out(session, job))

    background.add_task(queue.kick, settings)
    return _change(once, effect)


@router.post("/{job_id}/retry", response_model=JobOut, responses=responses(404, 409))
def retry_job(
    job_id: str, once: OnceDep, principal: PrincipalDep, settings: SettingsDep, background: BackgroundTasks
) -> Response:
    """Put a failed or cancelled job in line again, as a new attempt; a training resumes from its last checkpoint."""

    def effect(session: Session) -> Answer:
        job = service.retry(session, service.get_job(session, principal, job_id))
        return Answer(200, queries.job_out(session, job))

    background.add_task(queue.kick, settings)
    return _change(once, effect)


@router.delete("/{job_id}", status_code=204, responses=responses(404, 409))
def delete_job(
    job_id: str,
    principal: PrincipalDep,
    database: DatabaseDep,
    store: StoreDep,
    background: BackgroundTasks,
    artifacts: Annotated[bool, Query(description="Delete the artifacts that it made too.")] = False,
) -> None:
    """Delete a finished job: its history, logs, metrics and working folder. Refused while an unfinished job needs its outputs, and
    while it has artifacts, unless they are to be deleted too."""
    with database.write() as session:
        job = service.get_job(session, principal, job_id)
        made = service.delete_job(session, job, artifacts=artifacts)
    log.info("job.deleted", job_id=job_id, user=principal.user, artifacts=made)
    background.add_task(store.delete_job, job_id)
    for artifact_id in made:
        background.add_task(store.delete, artifact_id)


def _change(once: Once, effect: Callable[[Session], Answer]) -> Response:
    """Change a job's state; when the scheduler or a supervisor was faster, look again and decide anew."""
    for _ in range(_RACES):
        try:
            return once.run(effect)
        except InvalidTransition as race:
            log.info("job.change.raced", error=race.message)
    return once.run(effect)
