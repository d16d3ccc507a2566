"""Decoding any picture to upright 8-bit RGB, or saying why not."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from grid import encoded, grid_image
from PIL import Image
from profiles import P3_TO_SRGB, curved, display_p3, linear, told

from trainer.images.heic import read_heic
from trainer.images.pictures import BadPicture, decode, decode_grey, is_picture

# Both were written by pillow-heif, which can encode; what reads HEIC here cannot. The photograph
# has four colours and lies on its side: by its `irot` box, and once more by its EXIF data, as
# telephones write them. Of the two pictures the second is the primary one; it is in Display P3.
SAMPLES = Path(__file__).parent.parent / "samples"
HEIC = (SAMPLES / "photo.heic").read_bytes()
TWO_IN_HEIC = (SAMPLES / "two_pictures.heic").read_bytes()


def reason(content: bytes) -> str:
    with pytest.raises(BadPicture) as error:
        decode(content)
    return str(error.value)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A piece of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


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


def test_avif_and_a_matching_name_need_no_remark() -> None:
    """Rows 17 and 38."""
    image = grid_image(40, 40)

    assert decode(encoded(image, "AVIF"), "a.AVIF").remarks == ()
    assert decode(encoded(image, "JPEG"), "a/b.JPEG").remarks == ()
    assert decode(encoded(image, "JPEG"), "no_suffix").remarks == ()


def test_a_picture_under_the_name_of_another_format_is_read_and_said() -> None:
    """Row 27."""
    picture = decode(encoded(grid_image(40, 40)), "x.jpg")

    assert told(picture) == [("info", "is named .jpg but holds PNG, and is read so")]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_turning_upright_is_said_with_the_sizes(kind: str) -> None:
    """Row 28."""
    picture = decode(with_orientation(grid_image(100, 80), 6, kind))

    assert picture.size == (80, 100)
    assert told(picture) == [
        ("info", "is turned upright (EXIF orientation 6): 80x100 becomes 100x80")
    ]


def test_transparency_lies_on_white() -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:, :10] = (255, 0, 0, 255)
    pixels[:, 10:] = (0, 0, 0, 0)
    pixels[0, 0] = (0, 0, 255, 51)

    picture = decode(encoded(Image.fromarray(pixels)))

    decoded = np.asarray(picture.image)
    assert told(picture) == [("info", "has transparent areas, which are filled with white")]
    assert tuple(decoded[5, 5]) == (255, 0, 0)
    assert tuple(decoded[5, 15]) == (255, 255, 255)
    # 0.2 of blue over white: 0.8 * 255 = 204.
    assert tuple(decoded[0, 0]) == (204, 204, 255)


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)

    picture = decode(encoded(image, transparency=0))

    decoded = np.asarray(picture.image)
    assert told(picture) == [("info", "has transparent areas, which are filled with white")]
    assert tuple(decoded[0, 0]) == (255, 255, 255)
    assert tuple(decoded[1, 1]) == (10, 200, 30)


def test_an_opacity_that_hides_nothing_needs_no_remark() -> None:
    picture = decode(encoded(Image.new("RGBA", (20, 20), (9, 8, 7, 255))))

    assert picture.remarks == ()
    assert picture.alpha is None


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    values = np.full((20, 20), 257 * 100, np.uint16)
    values[0, 0] = 65535

    picture = decode(encoded(Image.fromarray(values)))

    decoded = np.asarray(picture.image)
    assert tuple(decoded[5, 5]) == (100, 100, 100)
    assert tuple(decoded[0, 0]) == (255, 255, 255)
    assert told(picture) == [("info", "has more than 8 bits a channel and is scaled to 8")]


def test_16_bit_colours_are_scaled_to_8_bits_and_said() -> None:
    """Pillow cannot write them, so the PNG is put together here."""
    rows = (b"\0" + struct.pack(">3H", 257 * 10, 257 * 120, 257 * 250) * 20) * 20
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows))

    picture = decode(png + chunk(b"IEND", b""))

    assert picture.image.getpixel((3, 3)) == (10, 120, 250)
    assert told(picture) == [("info", "has more than 8 bits a channel and is scaled to 8")]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_every_usual_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"

    decoded = decode(encoded(Image.new("RGB", (20, 20), "white").convert(mode), kind)).image

    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() >= 254


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame_is_used_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]

    picture = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))

    assert picture.image.getpixel((5, 5))[0] > 250
    assert told(picture) == [("warning", "has 2 frames or pages; only the first is used")]


def test_of_a_document_the_first_page_is_used_and_said() -> None:
    pages = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]

    picture = decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))

    assert picture.image.getpixel((5, 5)) == (255, 0, 0)
    assert told(picture) == [("warning", "has 3 frames or pages; only the first is used")]


def test_unreadable_exif_data_is_no_reason_to_refuse() -> None:
    content = encoded(grid_image(30, 50), "JPEG", exif=b"Exif\0\0nonsense that is no TIFF header")

    assert decode(content).size == (30, 50)


def test_a_flat_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")

    assert reason(bomb) == "it has more than 179 megapixels; scale it down first"


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
        (b"\0\0\0\x18ftypheic" + bytes(20), "cut off or damaged"),
        (HEIC[: len(HEIC) // 2], "cut off or damaged"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "a video"),
        (b"RIFF\0\0\0\0AVI LIST", "a video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "vector drawing"),
        (encoded(Image.new("L", (1, 1)), "GIF"), "an icon or a tracking pixel"),
        (encoded(Image.new("RGBA", (20, 20), (5, 5, 5, 0))), "every pixel is transparent"),
        (encoded(Image.new("F", (20, 20)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(content: bytes, says: str) -> None:
    assert says in reason(content)


def test_a_heic_photograph_is_turned_upright_once() -> None:
    picture = decode(HEIC, "IMG_1.HEIC")

    assert picture.size == (64, 48)
    assert picture.remarks == ()
    colours = [picture.image.getpixel(at) for at in ((12, 16), (36, 16), (12, 48), (36, 48))]
    expected = [(200, 40, 40), (40, 180, 60), (40, 60, 200), (220, 200, 60)]
    np.testing.assert_allclose(colours, expected, atol=8)


def test_of_a_heic_file_with_several_pictures_the_primary_one_is_used_and_said() -> None:
    picture = decode(TWO_IN_HEIC)

    expected = curved(linear(np.array([150, 100, 90]) / 255) @ P3_TO_SRGB.T) * 255
    assert picture.image.getpixel((30, 30)) == pytest.approx(tuple(expected), abs=3)
    assert told(picture) == [
        ("warning", "has 2 frames or pages; only the primary one is used"),
        ("info", "has its colours converted from `Display P3` to sRGB"),
    ]


def test_a_heic_photograph_with_too_many_pixels_is_not_decoded() -> None:
    with pytest.raises(Image.DecompressionBombError):
        read_heic(HEIC, max_pixels=64 * 48 - 1)


def test_a_heic_file_that_crashes_its_reader_is_refused_and_nothing_else_ends() -> None:
    """One byte of the kind of an item: pi_heif 1.4 ends its process by a segmentation fault."""
    damaged = HEIC.replace(b"\0\0Exif\0", b"\0\0Exi\xdd\0")

    assert damaged != HEIC
    assert "cut off or damaged" in reason(damaged)


def test_a_mask_may_be_a_heic_file() -> None:
    assert decode_grey(HEIC).shape == (64, 48)


def test_without_a_reader_for_heic_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 25: None in `sys.modules` is how Python itself marks what cannot be imported."""
    monkeypatch.setitem(sys.modules, "pi_heif", None)

    assert is_picture(HEIC)
    assert reason(HEIC) == (
        "it is a HEIC photo (iPhone), and no reader for it is installed; run "
        "`pip install 'tok-trainer[heic]'`, or export it as JPEG"
    )


def test_a_reader_for_heic_that_cannot_be_imported_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pi_heif.py").write_text("raise ImportError('libde265.so.0: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert reason(HEIC) == (
        "it is a HEIC photo (iPhone), and its reader pi_heif cannot be imported (libde265.so.0: "
        "no such file); install it anew, or export the photo as JPEG"
    )


@pytest.mark.parametrize(
    "content",
    [b"GIF89a" + b"x" * 50, b"BMW is a car", b"RIFF\0\0\0\0WEBP" + b"z" * 30, b"II*\0" + bytes(30)],
)
def test_what_only_begins_like_a_picture_is_refused_in_the_same_words(content: bytes) -> None:
    assert reason(content) == (
        "the file is cut off or damaged (its beginning is not that of a picture); copy it again"
    )


def test_decoding_in_threads_leaves_the_filters_of_warnings_as_they_are() -> None:
    exif = Image.Exif()
    exif[0x010F] = "the maker's name"
    damaged = encoded(grid_image(64, 64), "JPEG", exif=exif)
    entry = damaged.index(b"\x01\x0f\0\2") + 8
    # The name lies beyond the end of the file: Pillow warns of it.
    damaged = damaged[:entry] + struct.pack(">I", 60000) + damaged[entry + 4 :]
    with pytest.raises(UserWarning, match="Truncated File Read"):
        Image.open(BytesIO(damaged)).getexif().get(0x010F)
    content = [encoded(grid_image(256, 256), "JPEG"), damaged]
    decode(damaged)
    before = list(warnings.filters)

    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(decode, content * 40))

    assert warnings.filters == before
    assert len(pictures) == 80
    with pytest.raises(UserWarning, match="of somebody else"):
        warnings.warn("of somebody else", stacklevel=1)


def test_a_mask_of_nothing_but_transparency_is_black() -> None:
    assert decode_grey(encoded(Image.new("RGBA", (4, 4), (255, 255, 255, 0)))).max() == 0


def test_a_mask_is_read_as_numbers_whatever_colour_profile_it_has() -> None:
    content = encoded(Image.new("RGB", (4, 4), (100, 100, 200)), icc_profile=display_p3())

    np.testing.assert_allclose(decode_grey(content), 111 / 255, atol=1e-6)
