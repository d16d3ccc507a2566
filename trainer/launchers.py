"""What a process learns from its launcher, and tells past it: who speaks for all, the exit code.

torchrun and accelerate number their processes, and end with 1 whatever those end with.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NoReturn

# Names the file in which whoever started the launcher finds the exit code of the command.
EXIT_CODE_FILE = "TRAINER_EXIT_CODE_FILE"
# Of what was given and cannot be used, see `errors.InputError`.
_REFUSED = 2


def is_main_process() -> bool:
    """Whether this process speaks for the training; torchrun and accelerate number them."""
    return os.environ.get("RANK", "0") == "0"


def leave_exit_code(code: int) -> None:
    """Writes what this command ends with into the file that the environment names, if it does.

    The main process does, and every one that is refused what was given, which stands: all are given
    the same, and a launcher that sees the first one end may end the main one on its way there.

    The file is there before the command, on the machine of the main process. It is written over in
    its place: for that a full disk has room.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if not path or not (is_main_process() or code == _REFUSED):
        return
    # torchrun begins all processes again where it may: the last time counts.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").encode()
    with suppress(OSError), open(path, "r+b", buffering=0) as file:
        if file.read().split() == [b"%d" % _REFUSED, attempt]:
            return
        file.seek(0)
        file.truncate(file.write(b"%d %s\n" % (code, attempt)))


def end_at_once(code: int) -> NoReturn:
    """Ends this process where it stands, with this exit code."""
    try:
        leave_exit_code(code)
    finally:
        os._exit(code)
