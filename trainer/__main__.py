"""The console script and `python -m trainer`: the commands, and Ctrl-C while they are imported."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

from trainer.launchers import end_at_once


def main() -> None:
    """Runs the command line."""
    before = signal.getsignal(signal.SIGINT)
    # An exception in the middle of imports would be told as a traceback.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    from trainer import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


def _end_at_once(number: int, _: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"stopped at once; nothing was begun\n")
    end_at_once(128 + number)


if __name__ == "__main__":
    main()
