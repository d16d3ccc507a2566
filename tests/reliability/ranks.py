"""Starts the processes of trainings: imports torch once, and forks.

Reads a JSON object a line from stdin and answers with one on stdout: `start` runs `trainer`, or
`several_processes.py`, with these arguments in processes that are told apart as launchers do, and
answers with their ids; `ended` answers with the exit codes of those that have ended, below 0 where
a signal ended them. A fault in `hooks` is Python that runs first in the process of that rank.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import several_processes

from trainer import engine
from trainer.cli import run

CODES: dict[int, int] = {}
PROGRAMS = {"train": run, "several": lambda given: several_processes.train_all(*given[1:])}


def start(wanted: dict[str, Any]) -> list[int]:
    """Forks the processes of a training."""
    return [fork(wanted, rank) for rank in range(wanted["count"])]


def fork(wanted: dict[str, Any], rank: int) -> int:
    """Forks one of them, with its own log."""
    child = os.fork()
    if child:
        return child
    os.environ |= wanted["environment"] | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(wanted["count"]),
        "LOCAL_WORLD_SIZE": str(wanted["count"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(wanted["port"]),
    }
    log = os.open(f"{wanted['log']}.{rank}", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        exec(wanted["hooks"].get(str(rank), ""), {})
        code = PROGRAMS[wanted["arguments"][0]](wanted["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(_: dict[str, Any]) -> dict[int, int]:
    """Takes note of those that have ended."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            CODES[found[0]] = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        pass
    return CODES


def main() -> None:
    """Serves until stdin ends."""
    assert engine
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps({"start": start, "ended": ended}[wanted["do"]](wanted)), file=answers)
        answers.flush()
    # Nothing is left to be tidied, which takes torch seconds.
    os._exit(0)


if __name__ == "__main__":
    main()
