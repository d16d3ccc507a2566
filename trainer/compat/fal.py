"""Points Python's `fal_client` at this machine: by address, over plain http, uploads too.

The package has its addresses in names of its modules and offers no setting for all of them.
`patch_fal` puts others there until it is undone, and adds the `train_model` that a guide of the
service calls and no version of the package has. Made for every version from 0.5 on (tried: 0.5.9,
0.7.0, 0.10.0, 0.11.0, 0.13.2, 1.0.3); a version that lacks one of the names is refused.

    python -m trainer.compat.fal SCRIPT [ARGUMENTS]

runs an unchanged program so, with the address in TRAINER_URL.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from trainer.errors import InputError

DEFAULT_ADDRESS = "http://127.0.0.1:8700"
_ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
# Name in `fal_client.client` to what stands there; `_WHERE_PRESENT` came and went with versions.
_ADDRESSES = {
    "QUEUE_URL_FORMAT": "{base}/",
    "RUN_URL_FORMAT": "{base}/run/",
    "REST_URL": "{base}",
    "CDN_URL": "{base}",
}
_WHERE_PRESENT = {"REALTIME_URL_FORMAT": "{socket}/run/", "FAL_CDN_FALLBACK_URL": "{base}"}
# The package makes its two clients when it is imported. An upload keeps its address in them.
_CLIENTS = ("sync_client", "async_client")
_KEPT_BY_CLIENTS = "_token_manager"
_ABSENT = object()


class Patch:
    """What was changed in a package; undone at the end of a `with` block or by `undo`."""

    def __init__(self, clients: list[object]) -> None:
        self._clients = clients
        self._before: list[tuple[ModuleType, str, object]] = []

    def set(self, module: ModuleType, name: str, value: object) -> None:
        """Gives a name of a module another value, until undone."""
        self._before.append((module, name, vars(module).get(name, _ABSENT)))
        setattr(module, name, value)

    def forget_addresses(self) -> None:
        """Lets the package's own clients ask anew where uploads go."""
        for client in self._clients:
            vars(client).pop(_KEPT_BY_CLIENTS, None)

    def undo(self) -> None:
        """Puts back what stood there before; a second time does nothing."""
        while self._before:
            module, name, value = self._before.pop()
            if value is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, value)
        self.forget_addresses()

    def __enter__(self) -> Patch:
        """The patch, in force already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undoes it."""
        self.undo()


def patch_fal(base_url: str = DEFAULT_ADDRESS) -> Patch:
    """Points `fal_client` at a server, for this process.

    Best called before anything is uploaded: clients that a program made and uploaded with already
    keep the service's address. The package's own two clients do not.

    Args:
        base_url: the server's address, http or https, with a path where it lies below one.

    Raises:
        InputError: the address is none, or `fal_client` is missing or of an unknown make.
    """
    if not _ADDRESS.fullmatch(base_url):
        raise InputError.of(
            "base_url", f"`{base_url}` is not an address", f"for example `{DEFAULT_ADDRESS}`"
        )
    base = base_url.rstrip("/")
    package, client = _modules()
    known = _ADDRESSES | {k: v for k, v in _WHERE_PRESENT.items() if k in vars(client)}
    patch = Patch([vars(package)[name] for name in _CLIENTS if name in vars(package)])
    for name, form in known.items():
        value = form.format(base=base, socket="ws" + base.removeprefix("http"))
        for module in _holders(name, vars(client)[name]):
            patch.set(module, name, value)
    patch.set(package, "train_model", train_model)
    patch.set(package, "train_model_async", train_model_async)
    patch.forget_addresses()
    return patch


def train_model(config: Mapping[str, Any]) -> dict[str, str]:
    """Starts a training as the guide's `fal_client.train_model` does.

    Args:
        config: `model_type`, `training_images` and what else the training takes.

    Returns:
        `training_id`, which is the id of the request, and the addresses to ask after it.

    Raises:
        InputError: there is no `model_type`.
    """
    package, _ = _modules()
    return _started(package.submit(_application(config), arguments=dict(config)))


async def train_model_async(config: Mapping[str, Any]) -> dict[str, str]:
    """`train_model` for a program that awaits."""
    package, _ = _modules()
    return _started(await package.submit_async(_application(config), arguments=dict(config)))


def _modules() -> tuple[ModuleType, ModuleType]:
    """The package, and the module of it that holds the addresses.

    Raises:
        InputError: it is not installed, or of a make that has other names.
    """
    try:
        package = importlib.import_module("fal_client")
    except ModuleNotFoundError as error:
        hint = "install it into the environment of the program that uses it: pip install fal-client"
        raise InputError.of("fal_client", f"cannot be imported: {error}", hint) from error
    client = sys.modules.get("fal_client.client")
    missing = sorted(_ADDRESSES.keys() - (vars(client).keys() if client else set()))
    if client is None or missing:
        version = vars(package).get("__version__", "unknown")
        raise InputError.of(
            "fal_client",
            f"version {version} has no {', '.join(missing)} to point elsewhere",
            "use a version from 0.5 to 1.0, or leave the package as it is and set HTTPS_PROXY, "
            "as docs/clients.md shows",
        )
    return package, client


def _holders(name: str, value: object) -> list[ModuleType]:
    """The package's modules that hold an address: its home, and those that imported it by value."""
    modules = [
        module
        for path, module in sorted(sys.modules.items())
        if path.partition(".")[0] == "fal_client" and isinstance(module, ModuleType)
    ]
    return [module for module in modules if vars(module).get(name, _ABSENT) == value]


def _application(config: Mapping[str, Any]) -> str:
    """The endpoint of a kind of model.

    Raises:
        InputError: the kind is not named.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.-]+", kind):
        raise InputError.of(
            "model_type", f"`{kind}` names no kind of model", "for example `flux-lora`"
        )
    return f"fal-ai/{kind}"


def _started(handle: Any) -> dict[str, str]:
    return {
        "training_id": handle.request_id,
        "request_id": handle.request_id,
        "status_url": handle.status_url,
        "response_url": handle.response_url,
        "cancel_url": handle.cancel_url,
    }


def main() -> None:
    """Runs a program with `fal_client` pointed at the address in TRAINER_URL."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        named = f"`{sys.argv[1]}` is not a file" if len(sys.argv) > 1 else "no script is named"
        problem = InputError.of(
            "SCRIPT",
            named,
            "usage: [TRAINER_URL=…] python -m trainer.compat.fal SCRIPT [ARGUMENTS]",
        )
        print(problem, file=sys.stderr)
        raise SystemExit(problem.exit_code)
    script = sys.argv[1]
    try:
        patch = patch_fal(os.environ.get("TRAINER_URL", DEFAULT_ADDRESS))
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    sys.argv = sys.argv[1:]
    # As `python SCRIPT` does: what lies beside the script can be imported.
    sys.path[0] = str(Path(script).resolve().parent)
    with patch:
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
