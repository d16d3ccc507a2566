"""Where a job stands and what it led to, as the page is told: of every protocol's jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config import LEAVES
from trainer.config_files import parse_yaml
from trainer.generation import GenerationRequest
from trainer.job import MEANINGS, Result
from trainer.server.files import StoredFile
from trainer.server.inputs import CONCEPTS, DATA
from trainer.server.own import run_files
from trainer.server.own.messages import (
    Failure,
    File,
    JobDetails,
    JobLine,
    Note,
    Problem,
    Trial,
    Verdict,
    Wanted,
)
from trainer.server.queue import Job
from trainer.server.workshop import Workshop

NAME = "page"
# Under which of its fields a request for pictures names the training.
TRAINED = "trained"
# Who reads what, in the words of `MEANINGS`; DoRA's magnitudes most of them read otherwise.
_PROGRAMS = {
    "programs": "ComfyUI, A1111 and the like",
    "comfyui": "ComfyUI",
    "interfaces": "ComfyUI and A1111",
}


def line(job: Job, workshop: Workshop) -> JobLine:
    """A job in a list."""
    progress = None if job.state == "queued" else workshop.progress_of(job)
    return JobLine(
        id=job.id,
        protocol=job.protocol,
        app=job.app,
        kind=job.kind,
        state=job.state,
        name=job.name,
        cancel_requested=job.cancel_requested,
        created=job.created,
        started=job.started,
        ended=job.ended,
        position=workshop.queue.position(job) if job.state == "queued" else None,
        step=0 if progress is None else progress.step,
        total=0 if progress is None else progress.total,
        seconds_left=None if progress is None or job.is_over else progress.seconds_left,
    )


def details(job: Job, workshop: Workshop) -> JobDetails:
    """All that is known of a job."""
    run, result = workshop.folders.of(job.id).run, workshop.result(job)
    written = {} if job.kind == "generation" else parse_yaml(job.work, "work")
    resolved = written.get("resolved", {})
    ignored = written.get("ignored_options", {}) if result is None else result.ignored_options
    return JobDetails(
        **line(job, workshop).model_dump(),
        request=dict(job.request) if job.protocol == NAME else None,
        options=without_paths(_chosen(job, written, resolved.get("explicit", ())), workshop),
        notes=[Note.model_validate(without_paths(n, workshop)) for n in resolved.get("notes", ())],
        ignored_options=without_paths(ignored, workshop),
        failure=_failure(result),
        files=_files(job, result, workshop, _has_magnitudes(written)),
        trials=_trials(job, workshop) if job.kind == "training" else [],
        sampled=without_paths(run_files.sampled(run), workshop),
        has_report=run.report.is_file(),
        has_prepared=run_files.has_prepared(run),
    )


def without_paths(value: Any, workshop: Workshop) -> Any:
    """The same nested value with texts as strangers may read them."""
    if isinstance(value, str):
        return workshop.without_paths(value)
    if isinstance(value, Mapping):
        return {key: without_paths(inner, workshop) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner, workshop) for inner in value]
    return value


def _chosen(job: Job, written: Mapping[str, Any], explicit: Any) -> dict[str, Any]:
    """What somebody set on purpose, but for where pictures are."""
    if job.kind == "generation":
        asked = GenerationRequest.model_validate_json(job.work)
        told = asked.model_dump(mode="json", exclude_defaults=True, exclude={"trained", "notes"})
        return {name: value for name, value in told.items() if not name.startswith("guide_")}
    return {
        name: written[LEAVES[name].section][name]
        for name in explicit
        if name in LEAVES and name not in (*DATA, CONCEPTS)
    }


def _failure(result: Result | None) -> Failure | None:
    if result is None or result.status == "done":
        return None
    return Failure(
        message=result.error or "the job failed",
        hint=result.hint or "",
        problems=[Problem(field=p.field, message=p.message, hint=p.hint) for p in result.problems],
    )


def _has_magnitudes(written: Mapping[str, Any]) -> bool:
    return bool(written.get(LEAVES["use_dora"].section, {}).get("use_dora"))


def _files(job: Job, result: Result | None, workshop: Workshop, use_dora: bool) -> list[File]:
    """The files of a job that is done, each with what its readers said."""
    if result is None or job.state != "done":
        return []
    events = workshop.folders.of(job.id).run.read_events()
    verdicts: dict[str, list[Verdict]] = {}
    for event in events:
        if event.get("event") == "verify":
            verdict = Verdict(reader=event["reader"], status=event["status"])
            verdicts.setdefault(event["path"], []).append(verdict)
    stored: dict[Any, StoredFile] = {file.path: file for file in workshop.files.of_job(job.id)}
    root = workshop.folders.of(job.id).run.root
    programs = _PROGRAMS | ({"programs": "LyCORIS and the like"} if use_dora else {})
    return [
        File(
            role=file.role,
            meaning=MEANINGS[file.role].format_map(programs),
            name=file.path.rpartition("/")[2],
            size=file.size,
            content_type=file.content_type,
            address=stored[root / file.path].address,
            verdicts=verdicts.get(file.path, []),
        )
        for file in result.files
        if root / file.path in stored
    ]


def _trials(job: Job, workshop: Workshop) -> list[Trial]:
    """Pictures that the page has asked for with this training, newest first."""
    return [
        Trial(id=made.id, state=made.state, wanted=Wanted.model_validate(made.request["wanted"]))
        for made in workshop.queue.listed(NAME, "generation")
        if made.request.get(TRAINED) == job.id
    ]
