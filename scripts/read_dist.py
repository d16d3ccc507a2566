"""Looks into a wheel and a source archive: what must be there, and what nobody may get.

    python scripts/read_dist.py FOLDER

Prints the faults, or one line of what was found.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Files of a wheel beside its package.
IN_METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
IN_METADATA |= {"licenses/NOTICE"}
IN_SOURCES = {
    *("LICENSE", "NOTICE", "CHANGELOG.md", "README.md", "constraints.txt", "pyproject.toml"),
    *("scripts/check_wheel", "tests/conftest.py", "trainer/py.typed"),
}
LICENCES = {"LICENSE", "NOTICE"}
LARGEST_WHEEL = 5_000_000
# Names that no release has: what runs, tests and tools leave, and what holds keys.
NEVER = re.compile(
    r"(^|/)(__pycache__|\.venv|\.git|node_modules|\.mypy_cache|demo/run|runs)/|\.pyc$|"
    r"(^|/)(\.env|\.netrc|id_rsa|credentials[^/]*|token)$|\.(pem|key|p12)$"
)
# What keys look like, in whatever file. Those of tests are too short for these.
SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\n[A-Za-z0-9+/=\n]{100}|\bhf_[A-Za-z0-9]{30,}|"
    rb"\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
)
# Folders of people and of build machines.
PLACES = re.compile(rb"/(home|Users)/[a-z][a-z0-9_-]+/")

Files = Mapping[str, bytes]


def wheel_files(path: Path) -> Files:
    """Names and contents of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def source_files(path: Path) -> Files:
    """Names, without the folder around them, and contents of a source archive."""
    with tarfile.open(path) as archive:
        opened = ((member, archive.extractfile(member)) for member in archive if member.isfile())
        return {m.name.partition("/")[2]: file.read() for m, file in opened if file is not None}


def faults_of_wheel(files: Files) -> Iterator[str]:
    """What is wrong with a wheel."""
    folders = {name.partition("/")[0] for name in files}
    about = next((name for name in folders if name.endswith(".dist-info")), "")
    if folders != {"trainer", about}:
        yield f"the wheel has more than the package: {sorted(folders)}"
    missing = {f"{about}/{name}" for name in IN_METADATA} | {"trainer/py.typed"}
    missing |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trainer").rglob("*")
        if path.is_file() and NEVER.search(path.relative_to(ROOT).as_posix()) is None
    }
    missing |= {
        f"trainer/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "configs").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    yield from (f"the wheel lacks `{name}`" for name in sorted(missing - files.keys()))
    if (size := sum(map(len, files.values()))) > LARGEST_WHEEL:
        yield f"the wheel has {size} bytes, more than {LARGEST_WHEEL}"
    yield from _faults_of_metadata(
        BytesParser().parsebytes(files.get(f"{about}/METADATA", b"")),
        files.get(f"{about}/entry_points.txt", b"").decode(),
    )
    yield from _what_nobody_gets(files)


def _faults_of_metadata(metadata: Message, entry_points: str) -> Iterator[str]:
    if metadata["License-Expression"] != "Apache-2.0":
        yield "the metadata have no licence expression"
    if set(metadata.get_all("License-File", [])) != LICENCES:
        yield "the metadata do not name the licence files"
    if metadata["Version"] != _version():
        yield f"the metadata say version {metadata['Version']}, the package {_version()}"
    if "Typing :: Typed" not in metadata.get_all("Classifier", []):
        yield "the metadata do not say that there are types"
    if "trainer = trainer.__main__:main" not in entry_points:
        yield "there is no console script"


def _version() -> str:
    """The version where it stands: once, in the package."""
    text = (ROOT / "trainer/__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(version)


def faults_of_sources(files: Files) -> Iterator[str]:
    """What is wrong with a source archive."""
    yield from (f"the source archive lacks `{name}`" for name in sorted(IN_SOURCES - files.keys()))
    yield from _what_nobody_gets(files)


def _what_nobody_gets(files: Files) -> Iterator[str]:
    for name, content in files.items():
        if NEVER.search(name):
            yield f"`{name}` is in it"
        for kind, pattern in (("a key", SECRETS), ("a person's folder", PLACES)):
            # Tests have made-up folders.
            if not (kind != "a key" and name.startswith("tests/")) and pattern.search(content):
                yield f"`{name}` has what looks like {kind}"


def main() -> int:
    """Prints what is wrong with the one wheel and the one source archive of a folder."""
    folder = Path(sys.argv[1])
    (wheel,), (sources,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    in_wheel, in_sources = wheel_files(wheel), source_files(sources)
    found = [*faults_of_wheel(in_wheel), *faults_of_sources(in_sources)]
    print(*found, sep="\n", file=sys.stderr) if found else print(
        f"{wheel.name}: {len(in_wheel)} files; {sources.name}: {len(in_sources)} files"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
