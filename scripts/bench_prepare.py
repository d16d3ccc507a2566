"""Times the preparation of photographs, stage by stage.

It draws large photographs, prepares them with an empty cache folder in a process of its own, then
again into the same folder, and into another folder with what the cache kept. With --training it
starts a training of a tiny SDXL on them instead, twice with the same cache folder. Timers are put
around the stages' functions from outside: nothing in the product knows of them. Options:
bench_prepare.py --help
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

from trainer.config import CaptionConfig, DataConfig, FaceConfig, MaskConfig
from trainer.data import overview, prepare, steps, views
from trainer.data.picture_set import PictureSet
from trainer.data.prepared import Index
from trainer.data.store import Store
from trainer.images.clipseg import clipseg
from trainer.images.pretrained import quiet
from trainer.peaks import process_peak
from trainer.sources.archive import Source

# A stage's functions, each by the place where it is looked up.
Places = Mapping[str, tuple[tuple[Any, str], ...]]

# What each stage's functions are, by the place where they are looked up.
STAGES: Places = {
    "read and hash": (
        (Source, "read"),
        (prepare, "sha256_of"),
        (Index, "known"),
    ),
    "decode": ((views, "decode"),),
    "faces": ((views.Darkroom, "_faces"),),
    "thumbnail": ((views, "thumbnail_of"), (steps, "thumbnail_of")),
    "resize": ((views, "resize_to_cover"), (steps, "resize_to_cover")),
    "measure": ((views, "measure"),),
    "encode PNG": ((views, "_png"),),
    "store": (
        (views.Rendering, "packed"),
        (views.Rendering, "unpacked"),
        (Store, "get"),
        (Store, "put"),
        (Store, "prune"),
    ),
    "write": ((prepare, "write_rendering"), (prepare, "publish_index")),
    "sheet and report": ((overview, "write"),),
}
RUNS = ("first run", "same folder again", "new folder, from the cache")
TRAININGS = ("first training", "second training")

# Photographs have noise, which is what compressing them takes its time for.
GRAIN = 6.0
QUALITY = 90
# What CLIPSeg is asked for in how many pictures.
PROMPT = "head"
SEGMENTED = 5


def make_photographs(folder: Path, *, count: int, megapixels: float, faces: bool) -> None:
    """Writes JPEG files of 4:3, seeded: a portrait with a face or a cup of coffee, with grain."""
    folder.mkdir(parents=True)
    pixels = photographs.astronaut() if faces else photographs.coffee()
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    # Stretched to the shape of a camera's pictures: a few faces of 4:3 are as good as 1:1.
    large = Image.fromarray(pixels).resize(
        (round(height * 4 / 3), height), Image.Resampling.BICUBIC
    )
    plain = np.asarray(large, np.float32)
    for number in range(count):
        rng = np.random.default_rng(number)
        grain = rng.standard_normal(plain.shape[:2], np.float32)[..., None] * GRAIN
        grained = np.rint(plain + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(grained).save(folder / f"{number:03d}.jpg", quality=QUALITY)


@dataclass
class Stages:
    """What each stage took, over all threads.

    Args:
        cpu: seconds of work.
        passed: seconds from beginning to end.
    """

    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    passed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, stages: Places = STAGES) -> None:
        """Puts a timer around each function of these stages."""
        for stage, places in stages.items():
            for owner, name in places:
                plain = vars(owner)[name]
                if inspect.isgeneratorfunction(plain):
                    setattr(owner, name, self._timed_to_its_end(stage, plain))
                elif isinstance(plain, classmethod):
                    setattr(owner, name, classmethod(self._timed(stage, plain.__func__)))
                else:
                    setattr(owner, name, self._timed(stage, plain))

    def _timed_to_its_end(self, stage: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            cpu, start = time.thread_time(), time.perf_counter()
            value = yield from plain(*args, **options)
            self.cpu[stage] += time.thread_time() - cpu
            self.passed[stage] += time.perf_counter() - start
            return value

        return timed

    def _timed(self, stage: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            cpu, start = time.thread_time(), time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                with self.lock:
                    self.cpu[stage] += time.thread_time() - cpu
                    self.passed[stage] += time.perf_counter() - start

        return timed


def peak_megabytes() -> float:
    """The most memory that this process had at once."""
    return process_peak() / 2**20


def measure(photos: Path, folder: Path, store: Path, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Prepares photographs, and says what that took.

    Args:
        folder: where they are prepared.
        store: what was made before.
        wishes: `resolution`, `cropping` (whether face-aware) and options of `FaceConfig`.
    """
    stages = Stages()
    stages.watch()
    before = peak_megabytes()
    cpu, start = time.process_time(), time.perf_counter()
    work = prepare.prepare(_wanted(photos, **wishes), folder, Store(store))
    pictures = 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            pictures = len(end.value)
            break
    return {
        "pictures": pictures,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_megabytes": peak_megabytes(),
        "megabytes_before": before,
        "stages": {
            stage: {"cpu_seconds": stages.cpu[stage], "seconds": stages.passed[stage]}
            for stage in STAGES
        },
    }


def _wanted(photos: Path, *, resolution: int, cropping: bool, **face: Any) -> PictureSet:
    return PictureSet(
        data=DataConfig(
            images_data_url=str(photos),
            resolution_width=resolution,
            resolution_height=resolution,
            enable_bucket=True,
            face_aware_cropping=cropping,
        ),
        mask=MaskConfig(),
        face=FaceConfig(**face),
        caption=CaptionConfig(),
    )


def seconds_of_clipseg(folder: Path, pictures: list[Path]) -> tuple[float, float]:
    """Seconds and CPU seconds per prepared picture, by CLIPSeg of its true size, untrained.

    Args:
        folder: where the model is made.
    """
    make_clipseg(folder)
    find = clipseg(str(folder))
    opened = [Image.open(picture).convert("RGB") for picture in pictures]
    find(opened[0], PROMPT)
    cpu, start = time.process_time(), time.perf_counter()
    for picture in opened:
        find(picture, PROMPT)
    passed, worked = time.perf_counter() - start, time.process_time() - cpu
    return passed / len(opened), worked / len(opened)


def make_clipseg(folder: Path) -> None:
    """CLIPSeg as CIDAS/clipseg-rd64-refined is, with random weights: 151 M of them."""
    # Not above: the memory of the timed runs would hold them.
    import make_tiny_models  # noqa: PLC0415
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor  # noqa: PLC0415
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # noqa: PLC0415

    folder.mkdir(parents=True)
    tokenizer = make_tiny_models.make_tokenizer(folder, "<|endoftext|>")
    torch.manual_seed(0)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(use_complex_transposed_convolution=True))
    pixels = ViTImageProcessorPil(
        size={"height": 352, "width": 352},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with quiet():
        CLIPSegProcessor(pixels, tokenizer).save_pretrained(folder)
        model.save_pretrained(folder)


def bench(place: Path, photos: Path, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """The three runs, each in a process of its own.

    Args:
        place: an empty folder.
    """
    store = place / "store"
    folders = (place / "prepared", place / "prepared", place / "elsewhere")
    asked = [[str(path) for path in (photos, folder, store)] for folder in folders]
    return {run: _apart(*what, json.dumps(wishes)) for run, what in zip(RUNS, asked, strict=True)}


def _apart(*words: str) -> dict[str, Any]:
    """What `measure` says in a new process."""
    return _said_by(str(Path(__file__)), "--measure", *words)


def _said_by(*words: str, **environment: str) -> dict[str, Any]:
    """The JSON that a script of Python prints.

    Args:
        environment: variables beside this process's own.
    """
    done = subprocess.run(
        [sys.executable, *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def bench_training(place: Path, photos: Path, resolution: int) -> dict[str, Any]:
    """Two trainings up to their first step, in processes and run folders of their own.

    Args:
        place: an empty folder.
    """
    # Not above, for the memory's sake.
    import make_tiny_models  # noqa: PLC0415

    model = make_tiny_models.make_sdxl(place / "model")
    script, home = str(Path(__file__).with_name("training_start.py")), str(place / "cache")
    asked = [[str(path) for path in (model, photos, place / run)] for run in TRAININGS]
    told = {
        run: _said_by(script, *paths, str(resolution), XDG_CACHE_HOME=home)
        for run, paths in zip(TRAININGS, asked, strict=True)
    }
    first, second = (told[run]["preparation"] for run in TRAININGS)
    return {"runs": told, "second_to_first": second / first}


def table_of_trainings(told: Mapping[str, Any]) -> str:
    """What the starts of two trainings took, in lines."""
    lines = []
    for run, taken in told["runs"].items():
        lines.append(f"{run}: {taken['preparation']:.2f} s without imports and weights")
        lines += [f"  {stage:20}{seconds:9.2f} s" for stage, seconds in taken["stages"].items()]
    return "\n".join([*lines, f"second to first: {told['second_to_first']:.1%}"])


def table(run: str, told: Mapping[str, Any]) -> str:
    """What one run took, in lines."""
    worked = told["cpu_seconds"]
    lines = [
        f"{run}: {told['pictures']} pictures, {told['seconds']:.1f} s ({worked:.1f} s of work), "
        f"at most {told['peak_megabytes']:.0f} MB ({told['megabytes_before']:.0f} MB at the start)"
    ]
    stages = {name: (s["cpu_seconds"], s["seconds"]) for name, s in told["stages"].items()}
    rest = worked - sum(cpu for cpu, _ in stages.values())
    for name, (cpu, passed) in [*stages.items(), ("the rest", (rest, rest))]:
        lines.append(f"  {name:18}{cpu:8.2f} s of work {cpu / worked:5.0%}{passed:9.2f} s passed")
    return "\n".join(lines)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--photos", default=50, help="How many.")
@click.option("--megapixels", default=12.0, help="Of each.")
@click.option("--no-faces", is_flag=True, help="Photographs without a face, all else equal.")
@click.option("--resolution", default=1024, help="Trained width and height, as a bucket's area.")
@click.option("--no-cropping", is_flag=True, help="Do not look for faces.")
@click.option("--face-detector", default="haar", help="As the option of that name.")
@click.option("--face-detector-path", default=None, help="As the option of that name.")
@click.option("--clipseg", "segmented", is_flag=True, help="Time CLIPSeg beside, untrained.")
@click.option("--training", is_flag=True, help="Start a tiny training twice instead.")
@click.option("--json", "as_json", is_flag=True, help="Print all that was measured as JSON.")
def main(*, photos: int, megapixels: float, segmented: bool, as_json: bool, **wishes: Any) -> None:
    """Draws photographs, prepares them three times, prints what that took."""
    faces, cropping = not wishes.pop("no_faces"), not wishes.pop("no_cropping")
    training = wishes.pop("training")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_photographs(place / "photos", count=photos, megapixels=megapixels, faces=faces)
        if training:
            told = bench_training(place, place / "photos", wishes["resolution"])
            print(json.dumps(told, indent=2) if as_json else table_of_trainings(told))
            return
        told = {
            "cores": os.cpu_count(),
            "runs": bench(place, place / "photos", {"cropping": cropping, **wishes}),
        }
        if segmented:
            prepared = sorted((place / "prepared").glob("[0-9]*.png"))[:SEGMENTED]
            passed, worked = seconds_of_clipseg(place / "clipseg", prepared)
            told["clipseg"] = {"seconds": passed, "cpu_seconds": worked}
    if as_json:
        print(json.dumps(told, indent=2))
        return
    shown = "with a face" if faces else "without a face"
    print(f"{photos} photographs of {megapixels:g} megapixels {shown}, {told['cores']} cores")
    for run, taken in told["runs"].items():
        print(table(run, taken))
    if segmented:
        print(f"CLIPSeg: {passed:.2f} s a picture ({worked:.2f} s of work) besides")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        photos_at, prepared_at, store_at = map(Path, sys.argv[2:5])
        print(json.dumps(measure(photos_at, prepared_at, store_at, json.loads(sys.argv[5]))))
    else:
        main()
