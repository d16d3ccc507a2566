"""A messy set of photographs, as a folder or a zip: what phones, editors and uploads leave behind.

Everything is made from scikit-image's photographs (a woman facing the camera, coffee, a cat, a
rocket), always the same bytes. Boxes are (left, top, width, height) in the upright picture.
"""

from __future__ import annotations

import io
import zipfile
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw
from skimage import data as photographs

Box = tuple[float, float, float, float]

SIDEWAYS = "IMG_2031.JPG"
CUT_OUT = "portraits/cut-out.png"
DISTANT = "launch day.webp"
THREE_FACES = "three faces.jpg"
TILTED = "portraits/tilted.jpg"
NO_FACE = "coffee.jpg"
DUPLICATE = "copy of coffee.jpg"
CMYK = "cat for print.jpg"
TRUNCATED = "broken.jpg"
CAPTION_FILE = "IMG_2031.txt"
CAPTION = "a photograph of TOK in an orange space suit"
JUNK = ("__MACOSX/._IMG_2031.JPG", ".DS_Store", "portraits/.DS_Store")

# Pictures that can be trained, in the order of a zip's entries.
USABLE = (SIDEWAYS, CUT_OUT, DISTANT, THREE_FACES, TILTED, NO_FACE, DUPLICATE, CMYK)
# (height, width) upright.
SIZES = {
    SIDEWAYS: (1200, 900),
    CUT_OUT: (768, 768),
    DISTANT: (800, 1200),
    THREE_FACES: (640, 1360),
    TILTED: (800, 800),
    NO_FACE: (600, 900),
    DUPLICATE: (600, 900),
    CMYK: (600, 902),
}
# Her face in the photograph of 512 x 512, forehead to chin.
FACE: Box = (177.0, 66.0, 96.0, 110.0)
TILT = 30
# Parts of the three: how long each side is, where its left edge is, whether mirrored.
_THREE = ((400, 0, True), (640, 400, False), (320, 1040, False))
_DISTANT_SIDE, _DISTANT_PLACE = 280, (820, 420)


@cache
def messy_files() -> dict[str, bytes]:
    """The content of every file by its name."""
    coffee = _jpeg(_resized(photographs.coffee(), 900, 600))
    woman = _jpeg(_woman(600))
    return {
        JUNK[0]: b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(104),
        JUNK[1]: b"\x00\x00\x00\x01Bud1" + bytes(120),
        JUNK[2]: b"\x00\x00\x00\x01Bud1" + bytes(120),
        SIDEWAYS: _sideways(),
        CAPTION_FILE: f"{CAPTION}\n".encode(),
        CUT_OUT: _cut_out(),
        DISTANT: _distant(),
        THREE_FACES: _three_faces(),
        TILTED: _tilted(),
        NO_FACE: coffee,
        DUPLICATE: coffee,
        CMYK: _jpeg(_resized(photographs.cat(), 902, 600).convert("CMYK")),
        TRUNCATED: woman[: len(woman) * 6 // 10],
    }


def messy_folder(path: Path) -> Path:
    """Writes the set as a folder."""
    for name, content in messy_files().items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def messy_zip(path: Path) -> Path:
    """Writes the set as a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in messy_files().items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def faces() -> dict[str, tuple[Box, ...]]:
    """Where the faces of each usable picture are, the largest first."""
    left, top, width, height = FACE
    sideways = 1200 / 512
    three = tuple(_face_of_part(side, place, mirrored) for side, place, mirrored in _THREE)
    small = _DISTANT_SIDE / 512
    distant = (
        _DISTANT_PLACE[0] + left * small,
        _DISTANT_PLACE[1] + top * small,
        width * small,
        height * small,
    )
    tilted = 800 / 512
    return {
        # Cut to 384 of 512 columns, from the 40th on.
        SIDEWAYS: (_scaled((left - 40, top, width, height), sideways),),
        CUT_OUT: (_scaled(FACE, 1.5),),
        DISTANT: (distant,),
        THREE_FACES: (three[1], three[0], three[2]),
        # Turned about the middle of the face.
        TILTED: (_scaled(FACE, tilted),),
        NO_FACE: (),
        DUPLICATE: (),
        CMYK: (),
    }


def _scaled(box: Box, scale: float) -> Box:
    left, top, width, height = box
    return left * scale, top * scale, width * scale, height * scale


def _face_of_part(side: int, place: int, mirrored: bool) -> Box:
    left, top, width, height = _scaled(FACE, side / 512)
    # Parts stand on the lower edge.
    return place + (side - left - width if mirrored else left), 640 - side + top, width, height


def _resized(pixels: object, width: int, height: int) -> Image.Image:
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


def _woman(side: int) -> Image.Image:
    return _resized(photographs.astronaut(), side, side)


def _jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def _sideways() -> bytes:
    """A phone's photograph: stored lying on its side, its EXIF data say how to turn it."""
    upright = Image.fromarray(photographs.astronaut()).crop((40, 0, 424, 512))
    stored = upright.resize((900, 1200), Image.Resampling.LANCZOS).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(stored, exif=exif)


def _cut_out() -> bytes:
    """A person cut out by an editor: transparent outside an ellipse."""
    image = _woman(768)
    opacity = Image.new("L", image.size)
    ImageDraw.Draw(opacity).ellipse((120, 20, 640, 760), fill=255)
    image.putalpha(opacity)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _distant() -> bytes:
    """A wide picture with a small person at the lower right."""
    wide = _resized(photographs.rocket(), 1200, 800)
    person = _woman(_DISTANT_SIDE)
    shape = Image.new("L", person.size)
    ImageDraw.Draw(shape).ellipse((50, 0, 220, 400), fill=255)
    wide.paste(person, _DISTANT_PLACE, shape)
    file = io.BytesIO()
    wide.save(file, "WEBP", quality=90)
    return file.getvalue()


def _three_faces() -> bytes:
    """Three people of different sizes side by side, the middle one the largest."""
    image = Image.new("RGB", (1360, 640), (96, 104, 112))
    for side, left, mirrored in _THREE:
        part = _woman(side)
        if mirrored:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.paste(part, (left, 640 - side))
    return _jpeg(image)


def _tilted() -> bytes:
    """A head held at an angle."""
    image = _woman(800)
    left, top, width, height = _scaled(FACE, 800 / 512)
    middle = left + width / 2, top + height / 2
    turned = image.rotate(TILT, Image.Resampling.BICUBIC, center=middle, fillcolor=(200, 198, 194))
    return _jpeg(turned)
