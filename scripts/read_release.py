"""Whether a tag, the version and the changelog agree, before a release.

    python scripts/read_release.py v1.2.3

Prints nothing where they do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def faults(tag: str, package: str, changelog: str) -> Iterator[str]:
    """What does not agree.

    Args:
        tag: as `v1.2.3`.
        package: text of `trainer/__init__.py`.
        changelog: text of `CHANGELOG.md`.
    """
    found = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    version = found[1] if found else ""
    if tag != f"v{version}":
        yield f"the tag is `{tag}`, the version in trainer/__init__.py `{version}`"
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    lines = {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}
    ours = [text for head, text in lines.items() if re.match(rf"{re.escape(version)}\b", head)]
    if not ours or not ours[0].strip():
        yield f"CHANGELOG.md has no section `## {version}` with lines"
    if lines.get("Unreleased", "").strip():
        yield f"CHANGELOG.md has lines under `## Unreleased`; move them to `## {version}`"


def main() -> int:
    """Prints what does not agree."""
    package = (ROOT / "trainer/__init__.py").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = list(faults(sys.argv[1], package, changelog))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
