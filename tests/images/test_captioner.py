"""Captioners: which one a machine gets, the real classes on tiny weights, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from tiny_vision import (
    SENTENCE,
    tiny_blip,
    tiny_clipseg,
    tiny_florence2,
    tiny_joycaption,
    tiny_llava,
    tiny_qwen3_vl,
)

from trainer.config import CaptionConfig
from trainer.errors import InputError, OutOfMemoryError
from trainer.images.captioner import (
    KNOWN,
    Captioner,
    Choice,
    Unavailable,
    choose,
    identity_of,
    load,
)

GB = 10**9
PLENTY = 1000 * GB
SAID = SENTENCE.replace(".", " .")


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(photographs.astronaut()).crop((0, 0, 300, 200))


def chosen(
    free: float,
    *,
    has_torchvision: bool = False,
    has_bitsandbytes: bool = True,
    captioner: str = "auto",
    **leaves: Any,
) -> tuple[str, bool]:
    """Name and kind of the choice with so many gigabytes free."""
    choice = choose(
        CaptionConfig(captioner=captioner, **leaves),
        free_bytes=int(free * GB),
        has_torchvision=has_torchvision,
        has_bitsandbytes=has_bitsandbytes,
    )
    return choice.name, choice.in_4bit


def choice_of(folder: Path, **leaves: Any) -> Choice:
    settings = CaptionConfig(captioner=str(folder), **leaves)
    return choose(settings, free_bytes=PLENTY, has_torchvision=False)


def opened(folder: Path, **leaves: Any) -> Captioner:
    return load(choice_of(folder, **leaves))


@pytest.mark.parametrize(
    ("free", "has_torchvision", "expected"),
    [
        (80, True, ("qwen3-vl-8b", False)),
        (24, True, ("qwen3-vl-8b", False)),
        (23.9, True, ("qwen3-vl-2b", False)),
        (5.8, True, ("qwen3-vl-2b", False)),
        (5.7, True, ("qwen3-vl-2b", True)),
        (80, False, ("llava", False)),
        (15.6, False, ("llava", False)),
        (15.5, False, ("llava", True)),
        (6.2, False, ("llava", True)),
    ],
)
def test_auto_takes_the_best_that_fits(
    free: float, has_torchvision: bool, expected: tuple[str, bool]
) -> None:
    assert chosen(free, has_torchvision=has_torchvision) == expected


@pytest.mark.parametrize(
    ("free", "wish", "expected"),
    [
        (12, True, ("qwen3-vl-8b", True)),
        (80, True, ("qwen3-vl-8b", True)),
        (5, True, ("qwen3-vl-2b", True)),
        (12, False, ("qwen3-vl-2b", False)),
    ],
)
def test_auto_loads_in_4_bits_as_wished(
    free: float, wish: bool, expected: tuple[str, bool]
) -> None:
    assert chosen(free, has_torchvision=True, captioner_load_in_4bit=wish) == expected


@pytest.mark.parametrize(
    ("has_torchvision", "wish", "needed"),
    [(True, None, "3.5"), (False, None, "6.2"), (True, False, "5.8"), (False, False, "16")],
)
def test_where_nothing_fits_auto_says_what_would_be_needed(
    has_torchvision: bool, wish: bool | None, needed: str
) -> None:
    with pytest.raises(Unavailable, match=f"needs about {needed} GB; 2.0 GB are free"):
        chosen(2, has_torchvision=has_torchvision, captioner_load_in_4bit=wish)


@pytest.mark.parametrize("name", KNOWN)
def test_a_captioner_of_ours_is_taken_by_name(name: str) -> None:
    choice = choose(CaptionConfig(captioner=name), free_bytes=PLENTY, has_torchvision=False)

    assert choice.url == KNOWN[name].url
    assert choice.is_explicit
    assert not choice.in_4bit


def test_a_named_captioner_is_loaded_in_4_bits_where_only_that_fits() -> None:
    assert chosen(11, captioner="joycaption") == ("joycaption", True)


@pytest.mark.parametrize(
    ("name", "free", "leaves", "hint"),
    [
        ("joycaption", 11, {}, "use `captioner: qwen3-vl-2b`, load it in 4 bits, or give captions"),
        ("joycaption", 7, {}, "use `captioner: qwen3-vl-2b`, or give captions"),
        ("joycaption", 3, {}, "use `captioner: blip`, or give captions"),
        ("joycaption", 3, {"caption_mode": "style"}, "give captions"),
        ("qwen3-vl-2b", 4, {}, "use `captioner: florence-2`, load it in 4 bits, or give captions"),
        (
            "qwen3-vl-2b",
            3,
            {"captioner_load_in_4bit": True},
            "use `captioner: blip`, or give captions",
        ),
        (
            "qwen3-vl-2b",
            3,
            {"captioner_load_in_4bit": None},
            "use `captioner: blip`, or give captions",
        ),
        ("blip", 1, {}, "give captions"),
    ],
)
def test_a_named_captioner_that_does_not_fit_is_refused_with_the_ways_out_that_help(
    name: str, free: float, leaves: dict[str, Any], hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        chosen(
            free,
            captioner=name,
            **{"captioner_load_in_4bit": False, "caption_mode": "plain", **leaves},
        )

    (problem,) = caught.value.problems
    assert problem.field == "captioner"
    assert f"`{name}` needs about" in problem.message
    assert problem.hint == hint


@pytest.mark.parametrize("captioner", ["auto", "llava"])
def test_without_bitsandbytes_nothing_is_kept_in_4_bits(captioner: str) -> None:
    assert chosen(16, captioner=captioner, has_bitsandbytes=False) == ("llava", False)
    with pytest.raises((Unavailable, InputError), match="needs about 16 GB; 15 GB are free"):
        chosen(15, captioner=captioner, has_bitsandbytes=False)


@pytest.mark.parametrize("captioner", ["auto", "llava"])
def test_4_bits_that_cannot_be_had_are_refused_with_the_package_that_is_missing(
    captioner: str,
) -> None:
    with pytest.raises(InputError, match="pip install bitsandbytes") as caught:
        chosen(80, captioner=captioner, has_bitsandbytes=False, captioner_load_in_4bit=True)

    assert caught.value.problems[0].field == "captioner_load_in_4bit"


@pytest.mark.parametrize(
    ("free", "device", "dtype"),
    [
        (29.7, "cpu", torch.float32),
        (29.6, "cpu", torch.bfloat16),
        (80, "cuda", torch.bfloat16),
    ],
)
def test_a_choice_says_in_which_numbers_it_is_computed(
    free: float, device: str, dtype: torch.dtype
) -> None:
    """LLaVA's 14.1 GB in 16 bits, twice, and 1.5 GB beside them."""
    settings = CaptionConfig(captioner="llava")

    choice = choose(settings, free_bytes=round(free * GB), has_torchvision=False, device=device)

    assert choice.dtype == dtype


def test_a_name_that_is_nobodys_is_answered_by_those_there_are() -> None:
    with pytest.raises(InputError, match="got `lava`; allowed: `auto`, `llava`, `joycaption`"):
        chosen(80, captioner="lava")


def test_a_folder_is_measured_by_its_weights(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10 * GB)

    assert chosen(20, captioner=str(tmp_path)) == (str(tmp_path), False)
    assert chosen(8, captioner=str(tmp_path)) == (str(tmp_path), True)


@pytest.mark.parametrize("name", ["florence-2", "blip"])
@pytest.mark.parametrize("mode", ["character", "product", "style"])
def test_a_captioner_without_instructions_cannot_leave_out(name: str, mode: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen(80, captioner=name, caption_mode=mode)

    (problem,) = caught.value.problems
    assert problem.field == "caption_mode"
    assert "`llava`, `joycaption`, `qwen3-vl-8b`, `qwen3-vl-2b`" in problem.hint
    assert "blip" not in problem.hint


@pytest.mark.parametrize("mode", ["plain", "general"])
def test_a_captioner_without_instructions_can_tell_all(mode: str) -> None:
    assert chosen(80, captioner="blip", caption_mode=mode) == ("blip", False)


@pytest.mark.parametrize("make", [tiny_llava, tiny_joycaption, tiny_qwen3_vl])
def test_a_captioner_answers_in_words_of_its_own(
    make: Callable[[Path], Path], tmp_path: Path, astronaut: Image.Image
) -> None:
    captioner = opened(make(tmp_path))

    answer = captioner.caption(astronaut, "Write a caption of this picture.")

    # The answer alone: neither the prompt nor a mark of the model's is in it.
    assert answer == SAID
    assert captioner.follows_instructions


@pytest.mark.parametrize("make", [tiny_blip, tiny_florence2])
def test_a_captioner_without_instructions_answers_too(
    make: Callable[[Path], Path], tmp_path: Path, astronaut: Image.Image
) -> None:
    captioner = opened(make(tmp_path))

    answer = captioner.caption(astronaut, "anything")

    assert answer
    assert "[" not in answer and "<" not in answer
    assert answer == captioner.caption(astronaut, "anything else")
    assert not captioner.follows_instructions


@pytest.mark.parametrize("make", [tiny_blip, tiny_florence2])
def test_a_folder_without_instructions_cannot_leave_out(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="caption_mode"):
        opened(make(tmp_path), caption_mode="style")


def test_picture_and_instruction_reach_the_model(tmp_path: Path, astronaut: Image.Image) -> None:
    captioner = opened(tiny_llava(tmp_path, says=None))

    answers = {
        captioner.caption(image, asked)
        for image in (astronaut, Image.new("RGB", (50, 50), (255, 40, 0)))
        for asked in ("a man on the table", "a red cup with a blue cat")
    }

    assert len(answers) > 1


def test_the_same_picture_gets_the_same_answer(tmp_path: Path, astronaut: Image.Image) -> None:
    captioner = opened(tiny_llava(tmp_path, says=None))

    assert captioner.caption(astronaut, "a cup") == captioner.caption(astronaut, "a cup")


@pytest.mark.parametrize("size", [(1, 1), (3000, 40), (2500, 2500)])
@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen3_vl])
def test_pictures_of_any_size_are_captioned_and_left_as_they_are(
    make: Callable[[Path], Path], size: tuple[int, int], tmp_path: Path
) -> None:
    image = Image.new("RGB", size, (9, 90, 200))

    assert opened(make(tmp_path)).caption(image, "a photo") == SAID
    assert image.size == size


def test_a_llava_without_a_prompt_of_its_own_is_asked_as_llava_15(
    tmp_path: Path, astronaut: Image.Image
) -> None:
    captioner = opened(tiny_llava(tmp_path, template=False))

    assert captioner.caption(astronaut, "a photo") == SAID


def test_a_prompt_without_a_place_for_the_picture_is_refused(tmp_path: Path) -> None:
    folder = tiny_llava(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    with pytest.raises(InputError, match="no place for a picture"):
        opened(folder)


def test_a_processor_that_does_not_say_all_is_refused_before_weights_are_read(
    tmp_path: Path,
) -> None:
    folder = tiny_llava(tmp_path)
    described = json.loads((folder / "processor_config.json").read_text())
    del described["patch_size"]
    (folder / "processor_config.json").write_text(json.dumps(described))
    choice = choice_of(folder)
    (folder / "model.safetensors").unlink()

    with pytest.raises(InputError, match="could not be loaded: unsupported operand") as caught:
        load(choice)

    assert caught.value.problems[0].field == "captioner"


def test_llavas_older_files_are_read(tmp_path: Path, astronaut: Image.Image) -> None:
    folder = tiny_llava(tmp_path)
    described = json.loads((folder / "processor_config.json").read_text())
    pictures = described.pop("image_processor")
    pictures["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").write_text(json.dumps(described))

    assert opened(folder).caption(astronaut, "a photo") == SAID


def test_qwens_own_files_are_read_without_torchvision(
    tmp_path: Path, astronaut: Image.Image
) -> None:
    folder = tiny_qwen3_vl(tmp_path)
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    pictures |= {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))

    assert opened(folder).caption(astronaut, "a photo") == SAID


@pytest.mark.parametrize(
    "make", [tiny_llava, tiny_joycaption, tiny_qwen3_vl, tiny_blip, tiny_florence2]
)
def test_in_4_bits_what_writes_is_packed_and_what_sees_is_not(
    make: Callable[[Path], Path], tmp_path: Path, astronaut: Image.Image
) -> None:
    folder = make(tmp_path)
    whole: Any = opened(folder)
    in_4bit: Any = opened(folder, captioner_load_in_4bit=True)

    assert in_4bit.caption(astronaut, "a photo")
    assert identity_of(in_4bit.choice) != identity_of(whole.choice)
    names = [
        name
        for name, layer in in_4bit.model.named_modules()
        if type(layer).__name__ == "Linear4bit"
    ]
    assert names
    assert [name for name in names if "vision" in name or "visual" in name] == []


def test_a_captioner_is_known_by_what_it_holds(tmp_path: Path) -> None:
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"

    identities = [
        identity_of(choice_of(tiny_llava(one))),
        identity_of(choice_of(tiny_llava(same))),
        identity_of(choice_of(tiny_llava(other, says="a green cup."))),
    ]

    assert identities[0] == identities[1] != identities[2]


def test_a_captioner_of_other_numbers_is_another(tmp_path: Path, astronaut: Image.Image) -> None:
    choice = choice_of(tiny_llava(tmp_path))
    coarse = replace(choice, dtype=torch.bfloat16)

    captioner: Any = load(coarse)

    assert choice.dtype == torch.float32
    assert identity_of(choice) != identity_of(coarse)
    assert captioner.model.dtype == torch.bfloat16
    assert captioner.caption(astronaut, "a photo") == SAID


def test_a_closed_captioner_holds_no_weights(tmp_path: Path, astronaut: Image.Image) -> None:
    captioner = opened(tiny_llava(tmp_path))

    captioner.close()

    with pytest.raises(AssertionError, match="closed"):
        captioner.caption(astronaut, "a photo")


def test_nothing_is_said_while_it_or_the_segmenter_works(tmp_path: Path) -> None:
    folder, segmenter = tiny_llava(tmp_path / "llava"), tiny_clipseg(tmp_path / "clipseg")
    program = (
        "from PIL import Image\n"
        "from trainer.config import CaptionConfig\n"
        "from trainer.images.captioner import choose, load\n"
        "from trainer.images.clipseg import clipseg\n"
        f"settings = CaptionConfig(captioner={str(folder)!r})\n"
        "captioner = load(choose(settings, free_bytes=10**12, has_torchvision=False))\n"
        "picture = Image.new('RGB', (40, 30))\n"
        "print(captioner.caption(picture, 'a photo'))\n"
        f"print(clipseg({str(segmenter)!r})(picture, 'head').shape)\n"
    )

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )

    assert (done.stdout, done.stderr) == (f"{SAID}\n(352, 352)\n", "")


def test_what_auto_cannot_have_leaves_the_choice_to_the_caller() -> None:
    choice = choose(CaptionConfig(), free_bytes=PLENTY, has_torchvision=False)

    with pytest.raises(Unavailable, match="cannot be had: `llava-hf.* hub is out of reach"):
        load(choice)


@pytest.mark.parametrize("name", ["joycaption", "nobody/captioner", "/no/such/folder"])
def test_what_the_user_named_and_cannot_have_is_refused_with_the_ways_out(name: str) -> None:
    choice = choose(CaptionConfig(captioner=name), free_bytes=PLENTY, has_torchvision=False)

    with pytest.raises(InputError) as caught:
        load(choice)

    (problem,) = caught.value.problems
    assert problem.field == "captioner"
    assert "local folder" in problem.hint
    assert "skip_caption_generation: true" in problem.hint


def test_a_model_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a `clipseg` model; allowed: `llava`, `qwen2_5_vl`"):
        opened(tiny_clipseg(tmp_path))


def test_weights_with_a_tensor_missing_are_refused(tmp_path: Path) -> None:
    folder = tiny_blip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "crossattention" in name)
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match="1 tensors are missing"):
        opened(folder)


class _Full(torch.nn.Module):
    """A layer for which no memory is left."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_while_captioning_is_said_in_gigabytes(
    tmp_path: Path, astronaut: Image.Image
) -> None:
    captioner: Any = opened(tiny_llava(tmp_path))
    captioner.model.lm_head = _Full()

    with pytest.raises(OutOfMemoryError, match=r"needs about 1\.5 GB; .* GB are free") as caught:
        captioner.caption(astronaut, "a photo")

    assert "4 bits" in caught.value.hint


def test_a_torchvision_for_another_torch_counts_as_none_and_is_named(tmp_path: Path) -> None:
    folder = tiny_clipseg(tmp_path / "model")
    broken = tmp_path / "path" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "__version__ = '0.28.0'\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    information = broken.parent / "torchvision-0.28.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    program = (
        "from trainer.images import clipseg, pretrained\n"
        "from trainer.errors import InputError\n"
        "assert not pretrained.has_torchvision()\n"
        "try:\n"
        f"    clipseg.clipseg({str(folder)!r})\n"
        "except InputError as error:\n"
        "    print(error.problems[0].message)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(broken.parent)},
    )

    assert "the installed torchvision does not fit the installed torch" in done.stdout
