"""The same bits of every run on one GPU, where that is asked for: torch's own switches, and back.

On a processor the same threads compute the same bits without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.errors import InputError

# What cuBLAS needs to add in one order; read when the first matrix is multiplied on the GPU.
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_ORDERLY = (":4096:8", ":16:8")

# Torch names its switch in what it says of an operation that has no deterministic form.
_REFUSAL = "use_deterministic_algorithms"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Lets torch use only operations that give the same bits each time; what was set comes back.

    Attention needs no switch of its own: under this one torch takes the backward passes that add
    in one order, and leaves out cuDNN's, which has none.

    Args:
        wanted: false changes nothing.

    Raises:
        InputError: an operation has no such form, or the environment wants cuBLAS otherwise.
    """
    if not wanted:
        yield
        return
    _set_workspace()
    with _switched():
        try:
            yield
        except RuntimeError as error:
            if _REFUSAL not in str(error):
                raise
            raise InputError.of(
                "deterministic",
                f"true, but torch has no deterministic form of an operation of this training: "
                f"{str(error).splitlines()[0].partition('. ')[0]}",
                "set `deterministic: false`, or leave out the option that needs the operation",
            ) from error


def _set_workspace() -> None:
    given = os.environ.setdefault(_WORKSPACE, _ORDERLY[0])
    if given not in _ORDERLY:
        allowed = " or ".join(f"`{value}`" for value in _ORDERLY)
        raise InputError.of(
            "deterministic",
            f"true, but the environment variable {_WORKSPACE} is `{given}`; allowed: {allowed}",
            "unset it, or set `deterministic: false`",
        )


@contextmanager
def _switched() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn_before = (cudnn.deterministic, cudnn.benchmark)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_before
