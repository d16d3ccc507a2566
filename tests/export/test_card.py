"""The model card: its front-matter is YAML, its code runs, and it tells no secrets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checking import run_verification
from peft.tuners.tuners_utils import BaseTunerLayer
from trained_adapters import TrainedAdapter

from trainer.export.card import CardFile, model_card
from trainer.export.diffusers import FILE_NAME, write_diffusers
from trainer.export.facts import TrainingFacts
from trainer.export.full import write_denoiser
from trainer.export.verify import Check

FEW = ("attn2.to_k", "attn2.to_v", "conv1")
FILES = [
    CardFile("diffusers_lora", FILE_NAME),
    CardFile("kohya_lora", "astronaut.safetensors"),
    CardFile("kohya_lora_comfyui", "astronaut_comfyui.safetensors"),
]


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    state = trained("sd15", targets=FEW, use_dora=True).state

    card = model_card(
        facts, FILES, [], pipeline_class="StableDiffusionPipeline", state=state, tags=["tiny"]
    )

    found = front_matter(card)
    assert found["base_model"] == "owner/base"
    assert found["library_name"] == "diffusers"
    assert found["instance_prompt"] == 'a "TOK" portrait: in space'
    assert {"text-to-image", "lora", "dora", "tiny"} <= set(found["tags"])


def test_a_local_base_model_is_no_hub_id(facts: TrainingFacts) -> None:
    local = replace(facts, base_model="my-model")

    card = model_card(local, [], [], pipeline_class="StableDiffusionPipeline", state=None)

    assert "base_model" not in front_matter(card)
    assert "`my-model`" in card


@pytest.mark.parametrize(
    ("base_model", "call"),
    [
        ("owner/base", 'from_pretrained("owner/base")\n'),
        ("my-model", 'from_pretrained("path/to/my-model")  # the base model it was trained on\n'),
        (
            "mine.safetensors",
            'from_single_file("path/to/mine.safetensors")  # the base model it was trained on\n',
        ),
    ],
)
def test_the_cards_code_says_where_a_base_model_of_ones_own_has_to_be_put(
    base_model: str, call: str, facts: TrainingFacts
) -> None:
    card = model_card(
        replace(facts, base_model=base_model),
        [CardFile("denoiser_weights", "unet/diffusion_pytorch_model.safetensors")],
        [],
        pipeline_class="StableDiffusionPipeline",
        state=None,
    )

    assert f"pipe = StableDiffusionPipeline.{call}" in card


@pytest.mark.parametrize(
    ("changes", "said"), [((0.0, 0.0), True), ((0.0, 0.1), False), ((None, None), False)]
)
def test_the_card_says_when_nothing_was_learnt(
    changes: tuple[float | None, ...], said: bool, facts: TrainingFacts
) -> None:
    checks = [
        Check("outputs/a.safetensors", "kohya_lora", "formula", "passed", largest_change=change)
        for change in changes
    ]

    card = model_card(facts, FILES, checks, pipeline_class="StableDiffusionPipeline", state=None)

    assert ("Nothing was learnt" in card) is said


def test_the_card_says_what_dora_means_in_each_file(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    states = [trained("sd15", targets=FEW, use_dora=dora).state for dora in (True, False)]

    with_dora, without = (
        model_card(facts, FILES, [], pipeline_class="StableDiffusionPipeline", state=state)
        for state in states
    )

    assert "divide by the norm of the base weight" in with_dora
    assert "norm of the base weight" not in without


def test_the_card_lists_what_was_checked(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", targets=FEW)
    path = tmp_path / "outputs" / FILE_NAME
    write_diffusers(path, adapter.state, torch.float32)
    checks, _ = run_verification(tmp_path, [("diffusers_lora", path)], adapter)

    card = model_card(
        facts, FILES, checks, pipeline_class="StableDiffusionPipeline", state=adapter.state
    )

    rows = [line for line in card.splitlines() if line.startswith(f"| `{FILE_NAME}`")]
    assert len(rows) == len(checks) == 2
    assert all("passed" in row for row in rows)


def test_the_card_holds_no_place_and_is_the_same_every_time(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    state = trained("sd15", targets=FEW).state

    cards = {
        model_card(facts, FILES, [], pipeline_class="StableDiffusionPipeline", state=state)
        for _ in range(2)
    }

    assert len(cards) == 1
    assert "private" not in cards.pop()


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
def test_the_cards_code_loads_the_adapter(
    algorithm: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    sd15_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = trained("sd15", algorithm, targets=FEW, alpha=2)
    write_diffusers(tmp_path / FILE_NAME, adapter.state, torch.float32)
    here = replace(facts, base_model=sd15_folder.name)
    card = model_card(
        here, FILES, [], pipeline_class="StableDiffusionPipeline", state=adapter.state
    )
    monkeypatch.chdir(tmp_path)

    pipeline = _run(card, sd15_folder)

    adapted = 0
    for component, layers in adapter.weights.items():
        for name, module in pipeline.components[component].named_modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
                torch.testing.assert_close(module.get_base_layer().weight.data, layers[name])
                adapted += 1
    assert adapted == sum(map(len, adapter.weights.values()))


def test_the_cards_code_loads_a_whole_denoiser(
    facts: TrainingFacts,
    trained: Callable[..., TrainedAdapter],
    sd15_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = trained("sd15", targets=FEW).fresh().unet
    changed = {name: tensor + 1 for name, tensor in unet.state_dict().items()}
    write_denoiser(tmp_path / "unet", changed, unet.config, torch.float32)
    here = replace(facts, base_model=sd15_folder.name)
    files = [CardFile("denoiser_weights", "unet/diffusion_pytorch_model.safetensors")]
    card = model_card(here, files, [], pipeline_class="StableDiffusionPipeline", state=None)
    monkeypatch.chdir(tmp_path)

    pipeline = _run(card, sd15_folder)

    found = pipeline.unet.state_dict()
    assert all(torch.equal(found[name], changed[name]) for name in changed)


def _run(card: str, base: Path) -> object:
    """Runs the card's Python up to the picture with the base model's place, gives its pipeline."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert f"path/to/{base.name}" in code
    code = code.replace(f"path/to/{base.name}", str(base))
    scope: dict[str, object] = {}
    exec(code.split("image = ")[0], scope)
    return scope["pipe"]
