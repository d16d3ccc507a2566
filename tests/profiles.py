"""Colour profiles made by their specifications, and what Display P3 is in sRGB."""

from __future__ import annotations

import struct

import numpy as np

from trainer.images.pictures import Picture

# CSS Color 4 (https://www.w3.org/TR/css-color-4/#color-conversion-code): linear Display P3 to
# linear sRGB, by way of XYZ.
P3_TO_SRGB = np.array(
    [
        [1.2249401763, -0.2249401763, 0.0],
        [-0.0420569547, 1.0420569547, 0.0],
        [-0.0196375546, -0.0786360456, 1.0982736001],
    ]
)
# The colorants of Apple's Display P3 profile, XYZ adapted to D50.
P3_COLORANTS = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
D50 = (0.9642, 1.0, 0.8249)


def linear(encoded_values: np.ndarray) -> np.ndarray:
    """The sRGB curve (IEC 61966-2-1), which Display P3 has too."""
    low, high = encoded_values / 12.92, ((encoded_values + 0.055) / 1.055) ** 2.4
    return np.where(encoded_values <= 0.04045, low, high)


def curved(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc_profile(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, of the given tags (ICC.1:2001-04)."""
    body, table = b"", struct.pack(">I", len(tags))
    start = 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        table += signature + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*D50) + bytes(48)
    assert len(header) == 128
    return header + table + body


def described(name: str) -> bytes:
    text = name.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)


def point(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def curve(values: np.ndarray) -> bytes:
    steps = np.rint(values * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(steps)) + steps.tobytes()


def display_p3() -> bytes:
    tags = {b"desc": described("Display P3"), b"wtpt": point(D50), b"cprt": b"text\0\0\0\0-\0"}
    tags |= {name: point(values) for name, values in P3_COLORANTS.items()}
    shape = curve(linear(np.linspace(0, 1, 4096)))
    tags |= {b"rTRC": shape, b"gTRC": shape, b"bTRC": shape}
    return icc_profile(b"RGB ", b"mntr", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    tags = {b"desc": described("Grey"), b"wtpt": point(D50), b"cprt": b"text\0\0\0\0-\0"}
    tags[b"kTRC"] = curve(np.linspace(0, 1, 4096) ** gamma)
    return icc_profile(b"GRAY", b"mntr", b"XYZ ", tags)


def cmyk_profile() -> bytes:
    """Inks of which only black does anything: lightness falls from 100 to 0 with it."""
    identity = bytes(range(256))
    corners = [(255 if not black else 0, 128, 128) for _ in range(8) for black in (0, 1)]
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += identity * 4 + bytes(np.array(corners, np.uint8)) + identity * 3
    tags = {b"desc": described("Ink"), b"wtpt": point(D50), b"cprt": b"text\0\0\0\0-\0"}
    return icc_profile(b"CMYK", b"prtr", b"Lab ", {**tags, b"A2B0": table, b"A2B1": table})


def told(picture: Picture) -> list[tuple[str, str]]:
    return [(remark.kind, remark.text) for remark in picture.remarks]
