"""Decoding any picture to upright 8-bit RGB, or saying why not."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from grid import encoded, grid_image
from PIL import Image

from trainer.data.pictures import BadPicture, decode


def reason(content: bytes) -> str:
    with pytest.raises(BadPicture) as error:
        decode(content)
    return str(error.value)


def with_orientation(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


# The eight orientations of the EXIF standard (tag 274) as numpy operations that turn the stored
# rows upright.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright_by_its_exif_orientation(orientation: int) -> None:
    stored = grid_image(30, 50)

    picture = decode(with_orientation(stored, orientation))

    np.testing.assert_array_equal(
        np.asarray(picture.image), UPRIGHT[orientation](np.asarray(stored))
    )
    assert picture.size == np.asarray(picture.image).shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    image = grid_image(30, 50)

    np.testing.assert_array_equal(np.asarray(decode(encoded(image, kind)).image), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF"])
def test_lossy_formats_give_nearly_their_pixels(kind: str) -> None:
    image = Image.fromarray(np.full((64, 64, 3), (200, 120, 40), np.uint8))

    decoded = np.asarray(decode(encoded(image, kind)).image).astype(int)

    assert abs(decoded - (200, 120, 40)).max() <= 6


def test_a_phone_jpeg_of_two_pictures_gives_the_first_without_a_remark() -> None:
    image, second = grid_image(64, 64), grid_image(32, 32)

    picture = decode(encoded(image, "MPO", save_all=True, append_images=[second]))

    assert picture.size == (64, 64)
    assert picture.remarks == ()


def test_transparency_lies_on_white() -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:, :10] = (255, 0, 0, 255)
    pixels[:, 10:] = (0, 0, 0, 0)
    pixels[0, 0] = (0, 0, 255, 51)

    decoded = np.asarray(decode(encoded(Image.fromarray(pixels))).image)

    assert tuple(decoded[5, 5]) == (255, 0, 0)
    assert tuple(decoded[5, 15]) == (255, 255, 255)
    # 0.2 of blue over white: 0.8 * 255 = 204.
    assert tuple(decoded[0, 0]) == (204, 204, 255)


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)

    decoded = np.asarray(decode(encoded(image, transparency=0)).image)

    assert tuple(decoded[0, 0]) == (255, 255, 255)
    assert tuple(decoded[1, 1]) == (10, 200, 30)


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    values = np.full((20, 20), 257 * 100, np.uint16)
    values[0, 0] = 65535

    decoded = np.asarray(decode(encoded(Image.fromarray(values))).image)

    assert tuple(decoded[5, 5]) == (100, 100, 100)
    assert tuple(decoded[0, 0]) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_every_usual_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"

    decoded = decode(encoded(Image.new("RGB", (20, 20), "white").convert(mode), kind)).image

    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() >= 254


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_used_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]

    picture = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))

    assert picture.image.getpixel((5, 5))[0] > 250
    assert len(picture.remarks) == 1


def test_unreadable_exif_data_is_no_reason_to_refuse() -> None:
    content = encoded(grid_image(30, 50), "JPEG", exif=b"Exif\0\0nonsense that is no TIFF header")

    assert decode(content).size == (30, 50)


def test_a_flat_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")

    assert "megapixels" in reason(bomb)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_a_truncated_file_of_any_format_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)

    assert "cut off or damaged" in reason(content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_damaged_bytes_give_a_picture_or_a_reason_but_never_another_error(kind: str) -> None:
    content = encoded(grid_image(40, 40), kind)
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 6):
            damaged[place] = rng.integers(0, 256)
        try:
            decode(bytes(damaged))
        except BadPicture:
            outcomes.add("refused")
        else:
            outcomes.add("decoded")

    assert "refused" in outcomes or kind == "BMP"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (0 bytes)"),
        (b"this is text", "not a picture"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "vector drawing"),
        (encoded(Image.new("L", (1, 1)), "GIF"), "an icon"),
        (encoded(Image.new("RGBA", (20, 20), (5, 5, 5, 0))), "every pixel is transparent"),
        (encoded(Image.new("F", (20, 20)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(content: bytes, says: str) -> None:
    assert says in reason(content)
