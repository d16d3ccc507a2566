"""Makes a small set of photographs of one person, for the demo: make_demo_photos.py FOLDER

All come from the portrait of Eileen Collins (NASA, public domain) and two backgrounds that
scikit-image carries: other framings, other light, and the person in other places. Four have
captions of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from skimage import data

Picture = Image.Image

# The person's outline in the portrait, which is 512 pixels wide and high.
OUTLINE = [
    *[(18, 512), (24, 400), (42, 300), (62, 252), (112, 216), (114, 180), (150, 152), (182, 146)],
    *[(174, 122), (158, 108), (153, 76), (166, 44), (198, 20), (250, 16), (284, 38), (302, 76)],
    *[(290, 112), (268, 130), (262, 172), (288, 188), (306, 232), (338, 256), (352, 300)],
    *[(362, 352), (400, 345), (452, 352), (488, 388), (506, 450), (506, 512)],
]

CAPTIONS = {
    "portrait": "a portrait photograph of TOK in an orange space suit, a flag behind her",
    "close": "a close-up photograph of the face of TOK, smiling",
    "at_the_rocket": "a photograph of TOK in front of a rocket on its launch pad",
    "at_the_wall": "a photograph of TOK in front of a brick wall",
}


def make_photos(folder: Path) -> list[Path]:
    """Writes the photographs as JPEG files, and the captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    portrait = Image.fromarray(data.astronaut())
    paths = []
    for number, (name, take) in enumerate(TAKES.items()):
        path = folder / f"{number:02d}_{name}.jpg"
        take(portrait).save(path, quality=92)
        if name in CAPTIONS:
            path.with_suffix(".txt").write_text(CAPTIONS[name] + "\n")
        paths.append(path)
    return paths


def _crop(
    left: int, top: int, right: int, bottom: int, zoom: float = 1.0
) -> Callable[..., Picture]:
    def take(picture: Picture) -> Picture:
        cut = picture.crop((left, top, right, bottom))
        size = (round(cut.width * zoom), round(cut.height * zoom))
        return cut.resize(size, Image.Resampling.LANCZOS)

    return take


def _mirrored(picture: Picture) -> Picture:
    return ImageOps.mirror(picture.crop((60, 0, 400, 340)))


def _evening(picture: Picture) -> Picture:
    red, green, blue = picture.crop((90, 0, 410, 400)).split()
    warm = (red, green.point(lambda level: level * 0.88), blue.point(lambda level: level * 0.66))
    return ImageEnhance.Brightness(Image.merge("RGB", warm)).enhance(0.85)


def _black_and_white(picture: Picture) -> Picture:
    grey = ImageOps.grayscale(picture.crop((120, 0, 340, 280)))
    return ImageEnhance.Contrast(grey).enhance(1.2).convert("RGB")


def _tilted(picture: Picture) -> Picture:
    turned = picture.rotate(7, Image.Resampling.BICUBIC, center=(230, 110))
    return turned.crop((110, 30, 350, 330))


def _at_the_rocket(picture: Picture) -> Picture:
    background = Image.fromarray(data.rocket()).filter(ImageFilter.GaussianBlur(1.5))
    return _placed(picture, background.resize((640, 427)), (20, 60), 0.8)


def _at_the_wall(picture: Picture) -> Picture:
    wall = ImageOps.colorize(Image.fromarray(data.brick()), "#3a1d14", "#d9a58c")
    return _placed(picture, wall.filter(ImageFilter.GaussianBlur(1)), (70, 90), 0.85)


def _placed(person: Picture, background: Picture, corner: tuple[int, int], scale: float) -> Picture:
    """The person over another background, with a soft edge."""
    outline = Image.new("L", person.size)
    ImageDraw.Draw(outline).polygon(OUTLINE, fill=255)
    soft = outline.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.GaussianBlur(2))
    size = (round(person.width * scale), round(person.height * scale))
    result = background.copy()
    result.paste(person.resize(size), corner, soft.resize(size))
    return result


TAKES: Mapping[str, Callable[[Picture], Picture]] = {
    "portrait": _crop(0, 0, 512, 512),
    "close": _crop(140, 10, 310, 200, zoom=2.0),
    "bust": _crop(90, 0, 390, 330),
    "tall": _crop(70, 0, 350, 512),
    "wide": _crop(20, 10, 512, 300),
    "mirrored": _mirrored,
    "evening": _evening,
    "black_and_white": _black_and_white,
    "tilted": _tilted,
    "at_the_rocket": _at_the_rocket,
    "at_the_wall": _at_the_wall,
}


def main() -> None:
    """Makes the photographs in the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for path in make_photos(Path(sys.argv[1])):
        print(path)


if __name__ == "__main__":
    main()
