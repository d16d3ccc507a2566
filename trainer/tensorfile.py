"""Safetensors files with the same bytes for the same content.

The safetensors library writes its metadata keys in random order and its files with mode 0600,
so files that must be reproducible and readable by others are laid out here. Reading is left to
the library.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.durable import write_chunks
from trainer.errors import NonFiniteError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a safetensors file, durably and with deterministic bytes, a tensor at a time.

    Args:
        path: where to; replaced in one step.
        tensors: name to tensor, on any device, of any stride.
        metadata: strings for the header's `__metadata__`.
        dtype: number format of floating-point tensors. None: their own.

    Raises:
        DiskError: it could not be written.
        NonFiniteError: a value is not finite, perhaps in this number format only.
    """
    write_chunks(path, _chunks(tensors, metadata, dtype))


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes that `write` would put into a file."""
    return b"".join(_chunks(tensors, metadata, None))


def read_header(path: Path) -> dict[str, Any]:
    """The whole JSON header of a safetensors file: name to dtype, shape and offsets.

    Raises:
        ValueError: the file is not a safetensors file.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= 100_000_000:
            raise ValueError(f"`{path}` is not a safetensors file")
        try:
            header = json.loads(file.read(size))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"`{path}` is not a safetensors file") from error
    if not isinstance(header, dict):
        raise ValueError(f"`{path}` is not a safetensors file")
    return header


def _chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> Iterator[bytes]:
    formats = {
        name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    # Wide types first, as the library does, so that every tensor stays aligned to its type.
    names = sorted(tensors, key=lambda name: (-formats[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * formats[name].itemsize
        header[name] = {
            "dtype": _DTYPES[formats[name]],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield _raw(_finite(tensors[name].detach().to(formats[name]), name))


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor as it is written.

    Raises:
        NonFiniteError: it has values that are not finite, perhaps in this number format only.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise NonFiniteError(
            f"`{name}` has values that are not finite as {_DTYPES[tensor.dtype]}, so no file is "
            "written",
            "give save_dtype: fp32 or bf16, or lower learning_rate",
        )
    return tensor


def _raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
