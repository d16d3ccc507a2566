"""What makes a release: version, tag and changelog agree; the workflow builds what it checks."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import read_release
import yaml

from trainer import __version__

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github/workflows/release.yml"
PACKAGE = '__version__ = "1.2.3"\n'
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.3\n\n- A thing.\n\n## 1.2.2\n\n- Another.\n"


def test_a_tag_that_agrees_with_version_and_changelog_is_taken() -> None:
    assert list(read_release.faults("v1.2.3", PACKAGE, CHANGELOG)) == []


@pytest.mark.parametrize(
    ("tag", "package", "changelog", "said"),
    [
        ("v1.2.4", PACKAGE, CHANGELOG, "the tag is `v1.2.4`, the version"),
        ("1.2.3", PACKAGE, CHANGELOG, "the tag is `1.2.3`"),
        ("v1.2.3", "", CHANGELOG, "the tag is `v1.2.3`, the version in trainer/__init__.py ``"),
        ("v1.2.3", PACKAGE, CHANGELOG.replace("## 1.2.3", "## 1.2.30"), "no section `## 1.2.3`"),
        (
            "v1.2.3",
            PACKAGE,
            CHANGELOG.replace("- A thing.", ""),
            "no section `## 1.2.3` with lines",
        ),
        (
            "v1.2.3",
            PACKAGE,
            CHANGELOG.replace("Unreleased\n", "Unreleased\n\n- More.\n"),
            "has lines under `## Unreleased`",
        ),
    ],
)
def test_what_does_not_agree_is_told(tag: str, package: str, changelog: str, said: str) -> None:
    assert any(said in fault for fault in read_release.faults(tag, package, changelog))


def test_the_projects_own_version_is_found() -> None:
    package = (ROOT / "trainer/__init__.py").read_text()
    changelog = f"# Changelog\n\n## Unreleased\n\n## {__version__}\n\n- All.\n"

    assert list(read_release.faults(f"v{__version__}", package, changelog)) == []


def jobs() -> dict[str, Any]:
    return dict(yaml.safe_load(WORKFLOW.read_text())["jobs"])


def lines(job: dict[str, Any]) -> list[str]:
    return [line for step in job["steps"] for line in str(step.get("run", "")).splitlines()]


def test_files_that_the_workflow_names_are_there() -> None:
    named = set(
        re.findall(
            r"(?<![\w./*-])(?:\./)?((?:scripts|docs|configs|trainer|tests)/[\w./-]*\w"
            r"|(?:Dockerfile|Containerfile)[\w.-]*|[\w-]+\.(?:md|toml|txt|py|ya?ml))",
            WORKFLOW.read_text(),
        )
    )

    assert named >= {"scripts/test", "scripts/check_lowest", "scripts/check_wheel", "CHANGELOG.md"}
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_sums_are_of_what_was_built_and_not_of_themselves(tmp_path: Path) -> None:
    built = ["a-1.whl", "a-1.tar.gz", "sbom.cdx.json"]
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in built:
        (folder / name).write_text(name)
    (step,) = [step for step in jobs()["build"]["steps"] if step.get("name") == "Sums"]

    # Twice: what the first left is none of the second's.
    for _ in range(2):
        subprocess.run(["bash", "-ec", step["run"]], cwd=folder, check=True)
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)

    sums = (folder / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split()[1] for line in sums) == sorted(built)


def test_nothing_is_published_that_was_not_checked_and_built_before() -> None:
    assert jobs()["build"]["needs"] == "check"
    assert jobs()["publish"]["needs"] == "build"
    assert jobs()["publish"]["if"] == "github.ref_type == 'tag'"
    assert "sha256sum --check SHA256SUMS" in lines(jobs()["publish"])


def test_the_image_is_built_on_the_base_of_the_dockerfile_by_its_digest(tmp_path: Path) -> None:
    image = jobs()["image"]
    named = {step.get("name"): step["run"] for step in image["steps"] if "run" in step}
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/bash\necho sha256:abc of $4\n")
    docker.chmod(0o755)
    told = tmp_path / "told"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GITHUB_ENV": str(told),
        "GITHUB_REPOSITORY": "Owner/Trainer",
        "GITHUB_REF_NAME": "v1.2.3",
    }
    base_step = ["bash", "-ec", named["The base, by its digest"]]
    subprocess.run(base_step, cwd=ROOT, env=environment, check=True)
    dockerfile = (ROOT / "Dockerfile.cuda").read_text()
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, re.MULTILINE)

    assert base is not None
    assert told.read_text().splitlines() == [
        f"BASE_IMAGE={base[1]}@sha256:abc of {base[1]}",
        "IMAGE=ghcr.io/owner/trainer:1.2.3",
    ]
    assert image["needs"] == "publish"
    assert image["if"] == "github.ref_type == 'tag'"
    assert '--build-arg BASE_IMAGE="$BASE_IMAGE"' in named["Build"]
    steps = list(named)
    assert steps.index("Build") < steps.index("It is this version") < steps.index("Publish")


def test_only_jobs_that_publish_may_write_and_no_secret_is_kept_for_them() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())

    assert workflow["permissions"] == {"contents": "read"}
    assert {name for name, job in jobs().items() if "write" in str(job.get("permissions"))} == {
        "publish",
        "image",
    }
    assert "secrets." not in WORKFLOW.read_text()
