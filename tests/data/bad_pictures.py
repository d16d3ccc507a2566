"""Rows 11, 18 to 46 and 62 to 64 of the bad inputs: files that are no pictures, and odd ones."""

from __future__ import annotations

import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from asking import REFUSED, Case, Place, alone, beside, good_pictures, photograph
from bad_archives import WEB_PAGE
from grid import encoded
from PIL import Image, ImageFilter
from profiles import display_p3

from trainer.data.picture_set import PictureSet

VIDEO = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def a_picture(width: int = 130, height: int = 130) -> Image.Image:
    """One like the good ones, but none of them."""
    return photograph(20, 120, width, height).copy()


def vast_png() -> bytes:
    """The header of a flat PNG of 60000 x 60000 pixels before the pixels of a small one."""
    content = bytearray(encoded(Image.new("L", (64, 64))))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(a_picture(100, 130), "JPEG", exif=exif, quality=92)


def with_broken_exif() -> bytes:
    return encoded(a_picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + b"\xff" * 40)


def deep_grey() -> bytes:
    values = np.asarray(a_picture().convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(values))


def palette_with_hole() -> bytes:
    image = a_picture().quantize(16)
    return encoded(image, transparency=3)


def cut_out() -> bytes:
    image = a_picture()
    opacity = Image.new("L", image.size)
    opacity.paste(255, (40, 30, 100, 120))
    image.putalpha(opacity)
    return encoded(image)


def moving(kind: str) -> bytes:
    frames = [a_picture(), a_picture().rotate(90)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def soft() -> bytes:
    return encoded(a_picture(256, 256).filter(ImageFilter.GaussianBlur(8)), "JPEG")


def dark() -> bytes:
    return encoded(a_picture().point(lambda value: value // 9), "PNG")


def panorama() -> bytes:
    return encoded(photograph(0, 100, 500, 100), "JPEG", quality=92)


def without_heic_reader(place: Place) -> PictureSet:
    # How Python itself marks what cannot be imported.
    place.machine.setitem(sys.modules, "pi_heif", None)
    sample = Path(__file__).parent.parent / "samples" / "photo.heic"
    return beside({"IMG_1.HEIC": sample.read_bytes()})(place)


def first_good() -> bytes:
    return good_pictures()["g0.jpg"]


def good(name: str) -> Image.Image:
    return Image.open(BytesIO(good_pictures()[name]))


def resaved_smaller() -> bytes:
    return encoded(good("g1.jpg").resize((100, 100)), "JPEG", quality=70)


def mirrored() -> bytes:
    return encoded(good("g2.jpg").transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=90)


CASES = (
    Case(
        11,
        "a PNG of 60000 x 60000 pixels",
        beside({"big.png": vast_png}),
        5,
        (("warning: `big.png` is left out: it has more than 179 megapixels; scale it down first"),),
    ),
    Case(
        18,
        "an empty file",
        beside({"zero.jpg": b""}),
        5,
        ("warning: `zero.jpg` is left out: the file is empty (0 bytes)",),
    ),
    Case(
        19,
        "a JPEG cut off",
        beside({"cut.jpg": lambda: first_good()[:-200]}),
        5,
        (("warning: `cut.jpg` is left out: the file is cut off or damaged (…); copy it again"),),
    ),
    Case(
        20,
        "a PNG cut off",
        beside({"cut.png": lambda: encoded(a_picture())[:-2000]}),
        5,
        (("warning: `cut.png` is left out: the file is cut off or damaged (…); copy it again"),),
    ),
    Case(
        21,
        "text named .jpg",
        beside({"note.jpg": "this is a note"}),
        5,
        (
            (
                "warning: `note.jpg` is left out: it is not a picture that can be read "
                "(accepted: JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, HEIC)"
            ),
        ),
    ),
    Case(
        22,
        "a web page named .jpg",
        beside({"page.jpg": WEB_PAGE}),
        5,
        (
            (
                "warning: `page.jpg` is left out: it is a web page, probably an error page "
                "saved under this name"
            ),
        ),
    ),
    Case(
        23,
        "a Git LFS pointer named .png",
        beside({"p.png": LFS_POINTER}),
        5,
        (
            (
                "warning: `p.png` is left out: it is a Git LFS pointer, not the file itself; "
                "run `git lfs pull`"
            ),
        ),
    ),
    Case(
        24,
        "videos, by name and not",
        beside({"clip.mp4": VIDEO, "clip.jpg": VIDEO}),
        5,
        (
            "warning: these files are not pictures and are left out: `clip.mp4`",
            "warning: `clip.jpg` is left out: it is a video, not a still picture",
        ),
    ),
    Case(
        25,
        "a HEIC photo without a reader for it",
        without_heic_reader,
        5,
        (
            (
                "warning: `IMG_1.HEIC` is left out: it is a HEIC photo (iPhone), and no reader "
                "for it is installed; run `pip install 'tok-trainer[heic]'`, or export it as "
                "JPEG"
            ),
        ),
    ),
    Case(
        26,
        "an SVG drawing named .png",
        beside({"logo.png": "<svg xmlns='http://www.w3.org/2000/svg'/>"}),
        5,
        ("warning: `logo.png` is left out: it is a vector drawing (SVG); export it as PNG",),
    ),
    Case(
        27,
        "a PNG named .jpg",
        beside({"x.jpg": lambda: encoded(a_picture())}),
        6,
        ("info: `x.jpg` is named .jpg but holds PNG, and is read so",),
    ),
    Case(
        28,
        "a phone's photo stored sideways",
        beside({"side.jpg": sideways}),
        6,
        ("info: `side.jpg` is turned upright (EXIF orientation 6): 100x130 becomes 130x100",),
    ),
    Case(29, "broken EXIF data", beside({"exif.jpg": with_broken_exif}), 6, ()),
    Case(
        30,
        "a CMYK JPEG without a profile",
        beside({"cmyk.jpg": lambda: encoded(a_picture().convert("CMYK"), "JPEG")}),
        6,
        (("info: `cmyk.jpg` is CMYK, converted without a colour profile; its colours may be off"),),
    ),
    Case(
        31,
        "a grey PNG of 16 bits",
        beside({"g16.png": deep_grey}),
        6,
        ("info: `g16.png` has more than 8 bits a channel and is scaled to 8",),
    ),
    Case(
        32,
        "a palette PNG with transparency",
        beside({"pal.png": palette_with_hole}),
        6,
        ("info: `pal.png` has transparent areas, which are filled with white",),
    ),
    Case(
        33,
        "a person cut out",
        beside({"cut.png": cut_out}),
        6,
        (
            "info: `cut.png` has transparent areas, which are filled with white",
            "info: `cut.png` is pure white over 68% of its area",
        ),
    ),
    Case(
        34,
        "a PNG that is all transparent",
        beside({"inv.png": lambda: encoded(Image.new("RGBA", (90, 90)))}),
        5,
        ("warning: `inv.png` is left out: every pixel is transparent",),
    ),
    Case(
        35,
        "an animated GIF",
        beside({"an.gif": lambda: moving("GIF")}),
        6,
        ("warning: `an.gif` has 2 frames or pages; only the first is used",),
    ),
    Case(
        36,
        "an animated WebP",
        beside({"an.webp": lambda: moving("WEBP")}),
        6,
        ("warning: `an.webp` has 2 frames or pages; only the first is used",),
    ),
    Case(
        37,
        "a phone's JPEG of two pictures",
        beside({"two.jpg": lambda: moving("MPO")}),
        6,
        (),
    ),
    Case(38, "an AVIF", beside({"a.avif": lambda: encoded(a_picture(), "AVIF")}), 6, ()),
    Case(
        39,
        "a tracking pixel",
        beside({"t.gif": lambda: encoded(Image.new("L", (1, 1)), "GIF")}),
        5,
        (
            (
                "warning: `t.gif` is left out: 1x1 pixels: this looks like an icon or a "
                "tracking pixel"
            ),
        ),
    ),
    Case(
        40,
        "a tiny photo",
        beside({"tiny.jpg": lambda: encoded(a_picture().resize((20, 20)), "JPEG")}),
        6,
        (("warning: `tiny.jpg` (20x20) is enlarged 3.2 times and teaches blur; use a larger one"),),
    ),
    Case(
        41,
        "a blurred photo",
        beside({"soft.jpg": soft}),
        6,
        (
            (
                "warning: `soft.jpg` looks blurred or heavily enlarged (sharpness …; under 25 "
                "is soft)"
            ),
        ),
    ),
    Case(
        42,
        "a dark picture and one of one colour",
        beside({"dark.png": dark, "flat.png": lambda: encoded(Image.new("RGB", (90, 90), "red"))}),
        7,
        (
            "warning: `dark.png` is very dark (mean brightness … of 255)",
            "warning: `flat.png` is (almost) one flat colour",
        ),
    ),
    Case(
        43,
        "a panorama of 5:1",
        beside({"pano.jpg": panorama}),
        6,
        ("warning: `pano.jpg` (500x100) is 5.0:1; a 64x64 window keeps only 20% of it",),
    ),
    Case(
        44,
        "a copy under another name",
        beside({"h.jpg": first_good}),
        6,
        (
            (
                "warning: `h.jpg` is the same file as `g0.jpg`; "
                "keep one of each; every copy counts once more"
            ),
        ),
    ),
    Case(
        45,
        "one saved again smaller and one mirrored",
        beside({"n.jpg": resaved_smaller, "m.jpg": mirrored}),
        7,
        (
            (
                "info: `m.jpg` is nearly `g2.jpg` mirrored; `n.jpg` is nearly `g1.jpg`; "
                "variety helps more than more of the same"
            ),
        ),
    ),
    Case(
        46,
        "only two pictures",
        alone(
            {
                "a.jpg": lambda: good_pictures()["g0.jpg"],
                "b.jpg": lambda: good_pictures()["g1.jpg"],
            }
        ),
        2,
        ("warning: only 2 pictures; at least 10, better 20 to 30",),
    ),
    Case(
        62,
        "a mask of another shape: refused, the user meant it",
        beside({"g0_mask.png": lambda: encoded(Image.new("L", (30, 130), 255))}),
        REFUSED,
        (
            (
                "error: the mask `g0_mask.png` is 30x130, its picture 130x130 upright: the "
                "shapes differ, so they cannot be laid over each other"
            ),
            "hint: give the mask the shape of its picture as an image viewer shows it",
        ),
    ),
    Case(
        63,
        "Display P3",
        beside({"p3.jpg": lambda: encoded(a_picture(), "JPEG", icc_profile=display_p3())}),
        6,
        ("info: `p3.jpg` has its colours converted from `Display P3` to sRGB",),
    ),
    Case(
        64,
        "a damaged colour profile",
        beside({"icc.jpg": lambda: encoded(a_picture(), "JPEG", icc_profile=b"nonsense" * 40)}),
        6,
        (
            (
                "warning: `icc.jpg` has a colour profile that cannot be used (…); its colours "
                "may be slightly off"
            ),
        ),
    ),
)
