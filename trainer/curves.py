"""Curves in the file that TensorBoard reads, written by whoever adds a point.

TensorBoard's own writer has a thread: what goes wrong there is printed as a traceback, and the
training learns of it many steps later. It also makes another file at every start.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.durable import disk_errors

_NAME = "events.out.tfevents"
_FORMAT = "brain.Event:2"
# A record is its length in 8 bytes and a checksum of them in 4, the content, and its checksum in 4:
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_BEFORE, _AFTER = struct.Struct("<QL"), struct.Struct("<L")
_LENGTH = 8
# Channels of a picture, as `Summary.Image` counts colour spaces.
_RGB = 3
# Only as much of a file's end is looked at byte by byte: what a power cut may have left unwritten.
_UNSETTLED = 1 << 18


class CurveFile:
    """The file of points in a folder, gone on with where there is one.

    Args:
        folder: made where it is missing.
        first_step: earlier points from this step on are no longer shown.

    Raises:
        DiskError: it cannot be made.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        # TensorBoard takes files with this beginning, in the order of their names.
        earlier = sorted(folder.glob(f"{_NAME}.*"))
        new = folder / f"{_NAME}.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.0"
        self._path = earlier[-1] if earlier else new
        with disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: nothing is left to be written when it closes.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - until `close`
            self._file.truncate(_size_of_whole_records(self._path))
        self._records: Any = RecordWriter(self)
        self._add(Event(file_version=_FORMAT))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, points: Mapping[str, float]) -> None:
        """Adds a point to each of these curves.

        Raises:
            DiskError: they cannot be written.
        """
        values = [Summary.Value(tag=name, simple_value=value) for name, value in points.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def add_picture(self, step: int, name: str, path: Path) -> None:
        """Adds a picture, a file of PNG in RGB, to those of this name.

        Raises:
            DiskError: it cannot be read or written.
        """
        with disk_errors(path), Image.open(path) as picture:
            width, height = picture.size
            content = path.read_bytes()
        image = Summary.Image(
            height=height, width=width, colorspace=_RGB, encoded_image_string=content
        )
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def write(self, record: bytes) -> None:
        """Takes a record from TensorBoard's own encoding of them."""
        with disk_errors(self._path):
            left = memoryview(record)
            while left:
                left = left[self._file.write(left) or 0 :]

    def close(self) -> None:
        """Closes the file."""
        with disk_errors(self._path):
            self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _size_of_whole_records(path: Path) -> int:
    """Where the first record begins that a crash left unfinished, or the end.

    After a power cut a file may end in a part of a record, or in zeros. Readers go no further.
    """
    end, size = 0, path.stat().st_size
    with open(path, "rb") as file:
        while len(before := file.read(_BEFORE.size)) == _BEFORE.size:
            length, checksum = _BEFORE.unpack(before)
            record_end = end + _BEFORE.size + length + _AFTER.size
            if record_end > size or masked_crc32c(before[:_LENGTH]) != checksum:
                break
            if record_end > size - _UNSETTLED:
                content = file.read(length)
                if (masked_crc32c(content),) != _AFTER.unpack(file.read(_AFTER.size)):
                    break
            file.seek(record_end)
            end = record_end
    return end
