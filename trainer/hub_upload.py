"""What is asked of the Hugging Face hub, by a program of its own, as a training runs it.

It reads a task from stdin and writes an answer to stdout, both as JSON. The hub's client lives here
alone: it may be ended at any time, and its threads and signal handlers are none of a training's.
The token comes from where that client keeps it, and is neither in a task nor in an answer. Knows
nothing else of the project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypedDict

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

Kind = Literal["check", "upload"]

# What the hub says of a token that it does not take.
_UNKNOWN = (401, 403)


class Task(TypedDict):
    """What is to be done.

    Args:
        kind: look whether an upload can be done, or do it.
        repository: `name` or `owner/name`, as the hub allows them.
        private: whether nobody else may see it.
        folder: that the files lie in.
        files: paths below it, which they keep in the repository.
        message: of the commit.
    """

    kind: Kind
    repository: str
    private: bool
    folder: str
    files: list[str]
    message: str


class Answer(TypedDict, total=False):
    """What came of it.

    Args:
        status: `refused`: what was asked for cannot be; `failed`: the hub did not do it now.
        repository: in full, `owner/name`, where it is known; of an upload that failed: it is there,
            and nobody else sees it, where that was asked for.
        url: of the commit.
        field: the option at fault.
        message: what is wrong.
        hint: the next action.
    """

    status: Literal["ok", "refused", "failed"]
    repository: str
    url: str
    field: str
    message: str
    hint: str


def check(api: HfApi, task: Task) -> Answer:
    """Whether the hub takes this token and visibility.

    Raises:
        HfHubHTTPError: the hub does not say.
    """
    if constants.HF_HUB_OFFLINE:
        message = "nothing can be sent: HF_HUB_OFFLINE is set"
        return _refusal("push_to_hub", message, "unset it, or leave --push-to-hub out")
    if get_token() is None:
        message = "there is no token of the Hugging Face hub here"
        hint = "run `hf auth login`, or set HF_TOKEN; or leave --push-to-hub out"
        return _refusal("push_to_hub", message, hint)
    return _asked(api, task)


def _asked(api: HfApi, task: Task) -> Answer:
    """What the hub says of the token, and of a repository that is there already."""
    try:
        account = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code not in _UNKNOWN:
            raise
        message = f"{api.endpoint} does not know this token"
        hint = "run `hf auth login`, or set HF_TOKEN to one that is valid"
        return _refusal("push_to_hub", message, hint)
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        message = "the token may only read"
        hint = f"make one that may write at {api.endpoint}/settings/tokens, then `hf auth login`"
        return _refusal("push_to_hub", message, hint)
    repository = task["repository"]
    if "/" not in repository:
        repository = f"{account['name']}/{repository}"
    seen = _seen_by_others(api, repository) if task["private"] else None
    return seen or Answer(status="ok", repository=repository)


def upload(api: HfApi, task: Task) -> Answer:
    """Sends all files as one commit: afterwards all are there, or none.

    Raises:
        HfHubHTTPError: the hub has no repository for them.
    """
    created = api.create_repo(task["repository"], private=task["private"], exist_ok=True)
    repository = created.repo_id
    if task["private"] and (refusal := _seen_by_others(api, repository)):
        return refusal
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(task["folder"], name))
        for name in task["files"]
    ]
    try:
        commit = api.create_commit(repository, operations, commit_message=task["message"])
    except HfHubHTTPError as error:
        return Answer(status="failed", repository=repository, message=_in_one_line(error))
    return Answer(status="ok", repository=repository, url=commit.commit_url)


def _seen_by_others(api: HfApi, repository: str) -> Answer | None:
    """A refusal where a repository is public: the hub leaves an existing one as it is."""
    try:
        if api.model_info(repository).private:
            return None
    except RepositoryNotFoundError:
        return None
    message = f"`{repository}` is there already, and everybody can see it"
    hint = "make it private in its settings, or give another --hub-model-id or --hub-private false"
    return _refusal("hub_private", message, hint)


def _in_one_line(error: HfHubHTTPError) -> str:
    return " ".join(str(error).split())


def _refusal(field: str, message: str, hint: str) -> Answer:
    return Answer(status="refused", field=field, message=message, hint=hint)


_DOES: Mapping[Kind, Callable[[HfApi, Task], Answer]] = {"check": check, "upload": upload}


def main() -> None:
    """Reads a task, does it, and says what came of it."""
    task: Task = json.load(sys.stdin)
    try:
        answer = _DOES[task["kind"]](HfApi(), task)
    except HfHubHTTPError as error:
        answer = Answer(status="failed", message=_in_one_line(error))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
