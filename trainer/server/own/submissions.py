"""From what the page sends to a configuration: presets, options, and the pictures uploaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from trainer.config import LEAVES
from trainer.contracts import faults_in
from trainer.dialects import with_known_model
from trainer.errors import Problem
from trainer.generation import GenerationRequest, Trained
from trainer.leaves import nearest
from trainer.picture_lists import ListedPicture, picture_list
from trainer.presets import load_preset
from trainer.resolve import Layer
from trainer.server.inputs import CONCEPTS, DATA
from trainer.server.own import messages
from trainer.server.own.form import REFUSED
from trainer.server.own.messages import Checked, Note, Submission, Wanted
from trainer.server.queue import Job
from trainer.server.refusals import Refusal
from trainer.server.workshop import Workshop

SERVICE = "this server"
PICTURES = "images_data_url"
_PAGE = "your settings"
# Stands for the pictures where they do not matter.
_ANY_PICTURES = "https://photos.example"

Sent = TypeVar("Sent", bound=BaseModel)


def received(payload: Mapping[str, Any], model: type[Sent]) -> Sent:
    """What was sent; an option that is null is set to null.

    Raises:
        Refusal: with every field at fault.
    """
    fields = model.model_fields
    unknown = [name for name in payload if name not in fields]
    problems = [Problem(n, "there is no such field", nearest(n, tuple(fields))) for n in unknown]
    known = {name: value for name, value in payload.items() if name in fields}
    problems += [fault.problem(SERVICE) for fault in faults_in(known, model, {})]
    if problems:
        raise Refusal("invalid", "\n".join(map(str, problems)), problems=problems)
    return model.model_validate(known)


def told(problems: Iterable[Problem]) -> list[messages.Problem]:
    """What is wrong, as the page is told."""
    return [messages.Problem(field=p.field, message=p.message, hint=p.hint) for p in problems]


def configuration(sent: Submission, workshop: Workshop) -> str:
    """The configuration that a submission means here, as YAML.

    Raises:
        Refusal: with every option at fault.
    """
    return workshop.configuration(lambda: _layers(sent), str)


def checked(sent: Submission, workshop: Workshop) -> Checked:
    """What a submission means, or what is wrong with it, whatever its pictures.

    Raises:
        Refusal: the server itself is at fault.
    """
    options = {k: v for k, v in sent.options.items() if k not in (*DATA, CONCEPTS)}
    bare = sent.model_copy(update={"pictures": [], "archive": _ANY_PICTURES, "options": options})
    try:
        config = workshop.resolved(lambda: _layers(bare), str)
    except Refusal as refusal:
        if refusal.reason != "invalid":
            raise
        return Checked(problems=told(refusal.problems))
    values = {n: v for n, v in config.model_dump(mode="json").items() if n != "resolved"}
    flat = {name: value for section in values.values() for name, value in section.items()}
    return Checked(
        values={n: v for n, v in flat.items() if n not in (*DATA, CONCEPTS)},
        notes=[
            Note(kind=n.kind, field=n.field, message=workshop.without_paths(n.message))
            for n in config.resolved.notes
        ],
    )


def generation(wanted: Wanted, trained: Job, workshop: Workshop) -> str:
    """The work of making pictures with a finished training.

    Raises:
        Refusal: it has no result to make them with.
    """
    if trained.kind != "training" or trained.state != "done":
        raise Refusal.of("id", "the training is not done", "wait for its end")
    run = workshop.folders.of(trained.id).run.root.resolve()
    asked = wanted.model_dump(exclude={"strength"})
    request = GenerationRequest(trained=(Trained(run=str(run), strength=wanted.strength),), **asked)
    return request.model_dump_json()


def _layers(sent: Submission) -> list[Layer]:
    """The layers of a submission, which has named its pictures once.

    Raises:
        InputError: a preset that is none.
    """
    values, problems = dict(sent.options), list[Problem]()
    for name in REFUSED.keys() & values.keys():
        # A whole configuration names them with their defaults, which ask for nothing.
        if values.pop(name) not in (None, LEAVES[name].info.default):
            problems.append(Problem(name, REFUSED[name], "leave it out"))
    places = [bool(sent.pictures), sent.archive is not None, PICTURES in values]
    if sum(places) > 1:
        message = "are given in two ways; allowed: `pictures`, `archive` or this option"
        problems.append(Problem(PICTURES, message, "keep one of them"))
    if sent.pictures:
        listed = [ListedPicture(picture.address, picture.caption) for picture in sent.pictures]
        values[PICTURES] = picture_list(listed)
    elif sent.archive is not None:
        values[PICTURES] = sent.archive
    presets = [load_preset(name) for name in sent.presets]
    own = Layer(_PAGE, values, explicit=True, problems=problems)
    return [with_known_model(layer, "model_url") for layer in (*presets, own)]
