"""What stands between this machine and a training: findings, each with the line that fixes it.

Every check looks for itself and raises nothing; a library is loaded only by the check that is
about it, so that a broken one is a finding.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from trainer import __version__

DISTRIBUTION = "tok-trainer"
Status = Literal["ok", "warn", "fail"]

# Oldest NVIDIA driver for a major version of CUDA ("CUDA Compatibility", NVIDIA, table of
# minimum driver versions on Linux), and the index with torch built for it.
OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}
TORCH_INDEX = {13: "cu130", 12: "cu126"}

HUB = "https://huggingface.co"
HUB_SECONDS = 4.0
DISK_WARN_GB = 20.0
DISK_FAIL_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        check: what was looked at.
        status: `fail` where training cannot work, `warn` where something is missing or slow.
        message: what was found, with versions.
        fix: the line to type, empty where nothing needs one.
    """

    check: str
    status: Status
    message: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """All checks, one after the other."""
    yield Finding("trainer", "ok", __version__)
    yield python_finding(sys.version_info[:3])
    yield from package_findings()
    for check in CHECKS:
        yield check()


def python_finding(version: tuple[int, ...]) -> Finding:
    """Whether this Python is new enough."""
    shown = ".".join(map(str, version))
    if version >= (3, 11):
        return Finding("python", "ok", f"{shown} on {platform.system()} {platform.machine()}")
    return Finding("python", "fail", f"{shown} is older than 3.11", "python3.11 -m venv .venv")


def package_findings() -> Iterator[Finding]:
    """Whether each package that the project names is installed in its range."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        fix = "pip install -c constraints.txt -e ."
        yield Finding("packages", "warn", f"`{DISTRIBUTION}` is imported but not installed", fix)
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package_finding(requirement)


def package_finding(requirement: Requirement) -> Finding:
    """Whether one package is installed in its range."""
    wanted = f"{requirement.name}{requirement.specifier}"
    fix = f"pip install '{wanted}'"
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "fail", f"not installed, `{wanted}` is needed", fix)
    if not requirement.specifier.contains(Version(installed), prereleases=True):
        return Finding(requirement.name, "fail", f"{installed}, but `{wanted}` is needed", fix)
    return Finding(requirement.name, "ok", installed)


def gpu_finding() -> Finding:
    """Whether torch can use the GPU of this machine."""
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        fix = "pip install --force-reinstall -c constraints.txt torch"
        return Finding("gpu", "fail", f"torch cannot be loaded: {error}", fix)
    if torch.cuda.is_available():
        return Finding("gpu", "ok", _gpus(torch))
    return gpu_verdict(_driver(), torch.version.cuda, torch.__version__.split("+")[0])


def gpu_verdict(driver: str | None, cuda: str | None, torch_version: str) -> Finding:
    """Why torch sees no GPU.

    Args:
        driver: version of the NVIDIA driver, if there is one.
        cuda: version of CUDA that torch is built for, if any.
        torch_version: without its local label.
    """
    if driver is None:
        return Finding("gpu", "warn", "no NVIDIA GPU found: trainings run on the processor")
    major = int(driver.split(".")[0])
    fitting = next((number for number in TORCH_INDEX if major >= OLDEST_DRIVER[number]), None)
    if fitting is None:
        return Finding(
            "gpu",
            "fail",
            f"driver {driver} is too old for torch {torch_version}",
            f"install an NVIDIA driver of version {OLDEST_DRIVER[12]} or newer",
        )
    index = f"https://download.pytorch.org/whl/{TORCH_INDEX[fitting]}"
    fix = f"pip install --force-reinstall torch=={torch_version} --index-url {index}"
    if cuda is None:
        return Finding("gpu", "fail", f"torch {torch_version} is built without CUDA", fix)
    if int(cuda.split(".")[0]) > fitting:
        return Finding("gpu", "fail", f"driver {driver} is too old for CUDA {cuda}", fix)
    return Finding(
        "gpu",
        "fail",
        f"driver {driver} and CUDA {cuda} fit, but torch sees no GPU",
        "nvidia-smi  # and look at CUDA_VISIBLE_DEVICES, or start the container with --gpus all",
    )


def bitsandbytes_finding() -> Finding:
    """Whether the 8-bit optimizer can be used."""
    try:
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        fix = "pip install --force-reinstall bitsandbytes  # or keep to --optimizer adamw"
        return Finding("8-bit optimizer", "warn", f"bitsandbytes cannot be loaded: {error}", fix)
    return Finding("8-bit optimizer", "ok", "bitsandbytes loads")


def lycoris_finding() -> Finding:
    """Whether kohya files can be read back by LyCORIS."""
    try:
        version = metadata.version("lycoris-lora")
    except metadata.PackageNotFoundError:
        message = "not installed: kohya files are reported as not checked"
        return Finding("lycoris", "warn", message, f"pip install '{DISTRIBUTION}[lycoris]'")
    return Finding("lycoris", "ok", version)


def opencv_finding() -> Finding:
    """Whether this OpenCV finds faces: version 5 has no cascades any more."""
    fix = "pip install --force-reinstall 'opencv-python-headless>=4.13,<5'"
    try:
        cv2: Any = importlib.import_module("cv2")
    except (ImportError, OSError) as error:
        return Finding("faces", "warn", f"OpenCV cannot be loaded: {error}", fix)
    missing = [name for name in ("FaceDetectorYN", "CascadeClassifier") if not hasattr(cv2, name)]
    if missing:
        lacks = " and ".join(missing)
        return Finding("faces", "warn", f"OpenCV {cv2.__version__} lacks {lacks}", fix)
    return Finding("faces", "ok", f"OpenCV {cv2.__version__} finds them")


def torchvision_finding() -> Finding:
    """Whether torchvision, which only some captioners and face restoration need, loads.

    One made for another torch is worse than none: transformers then cannot load any image
    processor.
    """
    name = "torchvision"
    if importlib.util.find_spec(name) is None:
        message = (
            "not installed: faces cannot be redrawn, and `captioner: auto` takes LLaVA instead of "
            f"Qwen-VL, until pip install '{DISTRIBUTION}[caption]' or '{DISTRIBUTION}[restore]'"
        )
        return Finding(name, "ok", message)
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        fix = "pip uninstall torchvision  # or install the one that belongs to this torch"
        return Finding(name, "fail", f"is made for another torch: {error}", fix)
    return Finding(name, "ok", metadata.version(name))


def heic_finding() -> Finding:
    """Whether HEIC photographs can be read."""
    if importlib.util.find_spec("pi_heif") is not None:
        return Finding("heic", "ok", f"pi-heif {metadata.version('pi-heif')}")
    message = "not installed: HEIC photographs are left out"
    return Finding("heic", "warn", message, f"pip install '{DISTRIBUTION}[heic]'")


def hub_finding() -> Finding:
    """Whether base models can be fetched from the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        message = "HF_HUB_OFFLINE is set: only local base models and cached ones can be used"
        return Finding("hub", "warn", message, "unset HF_HUB_OFFLINE")
    address = os.environ.get("HF_ENDPOINT", HUB)
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return Finding("hub", "ok", f"{address} answers")
    except urllib.error.HTTPError as error:
        return Finding("hub", "ok", f"{address} answers, with status {error.code}")
    except (OSError, ValueError) as error:
        return Finding(
            "hub",
            "warn",
            f"{address} cannot be reached: {error}",
            "export HTTPS_PROXY=…  # or give --model-url a local folder or .safetensors file",
        )


def disk_finding() -> Finding:
    """Whether there is room for base models and results."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    places = {Path.cwd(), next(path for path in [cache, *cache.parents] if path.exists())}
    free, place = min((shutil.disk_usage(path).free / 1e9, str(path)) for path in places)
    message = f"{free:.0f} GB free at {place}"
    if free >= DISK_WARN_GB:
        return Finding("disk", "ok", message)
    status: Status = "fail" if free < DISK_FAIL_GB else "warn"
    return Finding("disk", status, message, f"make room, or export HF_HOME=…  # now {cache}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    gpu_finding,
    bitsandbytes_finding,
    lycoris_finding,
    opencv_finding,
    torchvision_finding,
    heic_finding,
    hub_finding,
    disk_finding,
)


def _gpus(torch: Any) -> str:
    devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    names = ", ".join(
        f"{device.name} with {device.total_memory / 1e9:.0f} GB" for device in devices
    )
    return f"{names}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    versions = answer.stdout.split()
    return versions[0] if versions and versions[0][0].isdigit() else None
