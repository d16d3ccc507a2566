"""What the mypy of another project sees of an installed wheel: its types, and misuse of them.

    python scripts/read_types.py ENVIRONMENT/bin/python

ENVIRONMENT has the wheel; mypy runs here. Prints nothing where all is seen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# A program that uses the package, and one line that uses it wrongly.
STRANGER = """\
from pathlib import Path

from trainer.compat.fal import patch_fal
from trainer.config import TrainingConfig
from trainer.job import RunFolder
from trainer.resolve import Layer, resolve

config = resolve([Layer("mine", {"images_data_url": "photos"}, explicit=True)])
reveal_type(config)
reveal_type(config.optim.learning_rate)
reveal_type(RunFolder(Path("run")).read_result())
steps: str = config.run.max_train_steps
"""
# What mypy says of it, in this order.
SEEN = (
    r'note: Revealed type is "trainer\.config\.TrainingConfig"',
    r'note: Revealed type is "(builtins\.)?float \| None"',
    r'note: Revealed type is "trainer\.job\.Result \| None"',
    r'error: .*expression has type "int", variable has type "str"',
)


def complaints(python: Path) -> str:
    """What mypy says of a stranger's program, away from the project's own files."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stranger.py").write_text(STRANGER)
        command = [sys.executable, "-P", "-m", "mypy", "--strict", "--no-incremental"]
        options = ["--config-file=", f"--python-executable={python.absolute()}", "stranger.py"]
        # Nothing but the environment may tell where the package is.
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, cwd=folder, env=alone
        )
    return done.stdout + done.stderr


def unseen(said: str) -> list[str]:
    """What of the types mypy does not see; all that it says, where that is not expected."""
    if "Found 1 error in 1 file" not in said:
        return said.splitlines()
    return [pattern for pattern in SEEN if re.search(pattern, said) is None]


def main() -> int:
    """Says what is not seen."""
    said = complaints(Path(sys.argv[1]))
    missing = unseen(said)
    if missing:
        print(said, "not seen:", *missing, sep="\n", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
