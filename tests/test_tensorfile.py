"""Tensor files: the same bytes for the same content, readable by the library they imitate."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from trainer import tensorfile

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
DUMP = """
import sys, torch
from trainer import tensorfile
tensors = {name: torch.full((3,), float(len(name))) for name in {"a", "bb", "ccc", "dddd"}}
metadata = {name: name for name in {"format", "author", "title", "licence"}}
sys.stdout.buffer.write(tensorfile.serialize(tensors, metadata))
"""


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {str(dtype): torch.arange(6).remainder(2).to(dtype).reshape(2, 3) for dtype in DTYPES}
    return {
        **tensors,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "part": torch.arange(10.0)[3:7],
    }


def bytes_under(hash_seed: str) -> bytes:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", DUMP]
    return subprocess.run(command, env=environment, capture_output=True, check=True).stdout


def test_the_library_reads_back_every_kind_of_tensor(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensorfile.write(tmp_path / "x.safetensors", tensors, {"format": "pt", "title": "Grüße"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_the_library_reads_the_metadata(tmp_path: Path) -> None:
    metadata = {"format": "pt", "title": "Grüße"}
    tensorfile.write(tmp_path / "x.safetensors", some_tensors(), metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
    assert tensorfile.read_header(tmp_path / "x.safetensors")["__metadata__"] == metadata


def test_the_header_of_the_librarys_own_files_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", {"format": "pt"})
    header = tensorfile.read_header(tmp_path / "x.safetensors")
    assert header["__metadata__"] == {"format": "pt"}
    assert header["a"]["shape"] == [2]


def test_the_order_of_names_does_not_change_the_bytes() -> None:
    tensors, metadata = some_tensors(), {"b": "1", "a": "2"}
    reversed_tensors = dict(reversed(tensors.items()))
    reversed_metadata = dict(reversed(metadata.items()))
    assert tensorfile.serialize(tensors, metadata) == tensorfile.serialize(
        reversed_tensors, reversed_metadata
    )


def test_strides_do_not_change_the_bytes() -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert tensorfile.serialize({"a": transposed}, {}) == tensorfile.serialize(
        {"a": transposed.contiguous()}, {}
    )


def test_other_content_changes_the_bytes() -> None:
    plain = tensorfile.serialize({"a": torch.zeros(2)}, {"x": "1"})
    assert plain != tensorfile.serialize({"a": torch.ones(2)}, {"x": "1"})
    assert plain != tensorfile.serialize({"a": torch.zeros(2)}, {"x": "2"})


def test_pythons_hash_seed_does_not_change_the_bytes() -> None:
    content = {bytes_under(seed) for seed in ("1", "4242")}
    assert len(content) == 1
    assert load(content.pop())["dddd"].tolist() == [4.0] * 3


def test_the_file_holds_what_serialize_gives(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensorfile.write(tmp_path / "x.safetensors", tensors, {"a": "b"})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content == tensorfile.serialize(tensors, {"a": "b"})


def test_a_number_format_for_all_is_that_of_tensors_turned_before(tmp_path: Path) -> None:
    tensors = some_tensors()
    turned = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    tensorfile.write(tmp_path / "x.safetensors", tensors, {"a": "b"}, torch.bfloat16)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content == tensorfile.serialize(turned, {"a": "b"})


def test_tensors_are_aligned_to_eight_bytes_after_the_header() -> None:
    content = tensorfile.serialize({"a": torch.ones(3, dtype=torch.float64)}, {"odd": "length"})
    assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        tensorfile.write(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 64, (5).to_bytes(8, "little") + b"hello", b"PK\x03\x04" * 9],
)
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors` is not a safetensors file"):
        tensorfile.read_header(path)
