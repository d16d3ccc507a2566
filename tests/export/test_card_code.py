"""The model card's code for diffusers, pasted as it is printed, makes a picture."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import FORMS, finished
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.job import RunFolder

# So that a picture of the widest tiny model takes no time.
SMALL = "num_inference_steps=1, height=64, width=64"
NEW_WORDS = {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK"}
# A few seconds each.
THOROUGH: list[tuple[str, dict[str, Any]]] = [
    ("sd15", {"use_dora": True}),
    ("sd15", {"lora_type": "lokr", "lokr_factor": 4}),
    ("sd15", FORMS["full"]),
    ("sdxl", {"lora_type": "loha", "train_text_encoder": True}),
    ("flux", {"lora_type": "loha"}),
    ("flux", NEW_WORDS),
]
CASES = [
    pytest.param("sdxl", NEW_WORDS),
    pytest.param("flux2", {}),
    *(pytest.param(*case, marks=pytest.mark.thorough) for case in THOROUGH),
]


@pytest.fixture
def half_encoders(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A base model of a family whose text encoders are kept in 16 bits, as published ones are."""

    def made(family: str) -> Path:
        source: Path = request.getfixturevalue(f"{family}_folder")
        folder = Path(shutil.copytree(source, tmp_path / "base"))
        for encoder in folder.glob("text_encoder*"):
            settings = json.loads((encoder / "config.json").read_text())
            named = settings | {"dtype": "float16"}
            (encoder / "config.json").write_text(json.dumps(named))
            weights = encoder / "model.safetensors"
            halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
            save_file(halves, weights, {"format": "pt"})
        return folder

    return made


@pytest.mark.parametrize(("family", "leaves"), CASES)
def test_the_code_of_a_card_makes_a_picture_as_it_is_printed(
    family: str,
    leaves: dict[str, Any],
    half_encoders: Any,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = half_encoders(family)
    outputs = RunFolder(finished(tmp_path / "run", base, photo_folder, **leaves)).outputs
    printed = re.search(r"```python\n(.*?)```", (outputs / "README.md").read_text(), re.DOTALL)
    assert printed is not None
    code = printed.group(1).replace("path/to/base", str(base))
    assert code.count(").images") == 1
    monkeypatch.chdir(outputs)

    scope: dict[str, Any] = {}
    exec(code.replace(").images", f", {SMALL}).images"), scope)

    parts = [part for part in scope["pipe"].components.values() if isinstance(part, nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    angles = {b.dtype for part in parts for n, b in part.named_buffers() if "inv_freq" in n}
    assert angles <= {torch.float32}
    assert np.asarray(scope["image"]).std() > 0
