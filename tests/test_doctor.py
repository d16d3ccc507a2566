"""Every fault of an installation is found, with the line that fixes it."""

from __future__ import annotations

import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path

import cv2
import pytest
from packaging.requirements import Requirement

from trainer import doctor

Usage = namedtuple("Usage", "total used free")


def test_every_finding_that_is_not_ok_but_for_a_missing_gpu_has_a_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    findings = list(doctor.examine())

    assert {"trainer", "python", "gpu", "hub", "disk"} <= {f.check for f in findings}
    assert not [f for f in findings if f.status != "ok" and not f.fix and f.check != "gpu"]


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok")])
def test_python_must_be_new_enough(version: tuple[int, ...], status: str) -> None:
    assert doctor.python_finding(version).status == status


def test_a_missing_package_is_named_with_its_range() -> None:
    finding = doctor.package_finding(Requirement("no-such-package-here>=2"))

    assert (finding.status, finding.fix) == ("fail", "pip install 'no-such-package-here>=2'")


def test_a_package_out_of_its_range_is_named_with_both_versions() -> None:
    finding = doctor.package_finding(Requirement("torch<2"))

    assert finding.status == "fail"
    assert "`torch<2` is needed" in finding.message


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "in_message", "in_fix"),
    [
        (None, None, "warn", "no NVIDIA GPU", ""),
        ("580.65.06", None, "fail", "without CUDA", "torch==2.13.0 --index-url"),
        ("580.65.06", None, "fail", "without CUDA", "whl/cu130"),
        ("550.54", "13.0", "fail", "too old for CUDA 13.0", "whl/cu126"),
        ("470.10", "13.0", "fail", "too old for torch", "NVIDIA driver of version 525"),
        ("580.65.06", "13.0", "fail", "sees no GPU", "nvidia-smi"),
    ],
)
def test_the_reason_for_an_unusable_gpu_is_told(
    driver: str | None, cuda: str | None, status: str, in_message: str, in_fix: str
) -> None:
    finding = doctor.gpu_verdict(driver, cuda, "2.13.0")

    assert finding.status == status
    assert in_message in finding.message
    assert in_fix in finding.fix


def test_a_broken_torch_is_a_finding_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    assert doctor.gpu_finding().status == "fail"


def test_an_unreachable_hub_is_a_warning_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    finding = doctor.hub_finding()

    assert finding.status == "warn"
    assert address in finding.message
    assert "--model-url" in finding.fix


@pytest.mark.parametrize(("free", "status"), [(1e9, "fail"), (10e9, "warn"), (100e9, "ok")])
def test_disk_space_is_judged(monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))

    assert doctor.disk_finding().status == status


def test_a_torchvision_made_for_another_torch_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    finding = doctor.torchvision_finding()

    assert finding.status == "fail"
    assert "torchvision::nms" in finding.message
    assert finding.fix.startswith("pip uninstall torchvision")


def test_an_opencv_without_cascades_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.opencv_finding().status == "ok"
    monkeypatch.delattr(cv2, "CascadeClassifier")

    finding = doctor.opencv_finding()

    assert finding.status == "warn"
    assert "lacks CascadeClassifier" in finding.message
    assert "<5" in finding.fix
