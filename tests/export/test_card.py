"""The model card: its front-matter is YAML, its code runs, and it tells no secrets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from checking import run_verification
from peft.tuners.tuners_utils import BaseTunerLayer
from trained_adapters import SD15, TABLES, TrainedAdapter

from trainer.export.card import model_card
from trainer.export.card_loading import CardFile
from trainer.export.diffusers import FILE_NAME, write_diffusers
from trainer.export.embeddings import write_token_files
from trainer.export.extraction import extract
from trainer.export.facts import TrainingFacts
from trainer.export.full import write_denoiser, write_text_encoder
from trainer.export.state import Strength
from trainer.export.verify import Check
from trainer.stages import drained

FEW = ("attn2.to_k", "attn2.to_v", "conv1")
FILES = [
    CardFile("diffusers_lora", FILE_NAME),
    CardFile("kohya_lora", "astronaut.safetensors"),
    CardFile("kohya_lora_comfyui", "astronaut_comfyui.safetensors"),
]
WHOLE = [CardFile("denoiser_weights", "unet/diffusion_pytorch_model.safetensors")]


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    state = trained("sd15", targets=FEW, use_dora=True).state

    card = model_card(
        facts,
        FILES,
        [],
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=state,
        tags=["tiny"],
    )

    found = front_matter(card)
    assert found["base_model"] == "owner/base"
    assert found["library_name"] == "diffusers"
    assert found["instance_prompt"] == 'a "TOK" portrait: in space'
    assert {"text-to-image", "lora", "dora", "tiny"} <= set(found["tags"])


@pytest.mark.parametrize("prompts", [("a TOK",), ("a TOK1", "a TOK2")])
def test_prompts_are_as_long_as_captions_were(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, prompts: tuple[str, ...]
) -> None:
    state = trained("flux", targets=("to_q",)).state
    few = replace(facts, instance_prompts=prompts, settings={"max_sequence_length": 64})
    usual = replace(facts, instance_prompts=prompts, settings={"max_sequence_length": None})

    cards = [
        model_card(
            each, FILES, [], pipeline_class="FluxPipeline", names=TABLES["flux"], state=state
        )
        for each in (few, usual)
    ]

    assert len(re.findall(r"pipe\(.*, max_sequence_length=64\)\.images", cards[0])) == 1
    assert "| max_sequence_length | 64 |" in cards[0]
    assert "max_sequence_length" not in cards[1]


def test_a_local_base_model_is_no_hub_id(facts: TrainingFacts) -> None:
    local = replace(facts, base_model="my-model")

    card = model_card(
        local, [], [], pipeline_class="StableDiffusionPipeline", names=SD15, state=None
    )

    assert "base_model" not in front_matter(card)
    assert "`my-model`" in card


@pytest.mark.parametrize(
    ("base_model", "call"),
    [
        ("owner/base", 'from_pretrained("owner/base", {})\n'),
        ("mine", 'from_pretrained("path/to/mine", {})  # the base model it was trained on\n'),
        (
            "my.safetensors",
            'from_single_file("path/to/my.safetensors", {})  # the base model it was trained on\n',
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
        names=SD15,
        state=None,
    )

    told = call.format("dtype=torch.bfloat16")
    assert f"pipe = StableDiffusionPipeline.{told}" in card


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

    card = model_card(
        facts, FILES, checks, pipeline_class="StableDiffusionPipeline", names=SD15, state=None
    )

    assert ("Nothing was learnt" in card) is said


def test_the_card_says_what_dora_means_in_each_file(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    states = [trained("sd15", targets=FEW, use_dora=dora).state for dora in (True, False)]

    with_dora, without = (
        model_card(
            facts, FILES, [], pipeline_class="StableDiffusionPipeline", names=SD15, state=state
        )
        for state in states
    )

    assert "divide by the norm of the base weight" in with_dora
    assert "norm of the base weight" not in without
    plain = "`astronaut.safetensors`: the adapter for"
    assert f"{plain} LyCORIS" in with_dora
    assert f"{plain} ComfyUI, A1111, Forge, InvokeAI, sd-scripts and LyCORIS" in without


def test_a_dora_without_a_file_for_comfyui_is_not_told_to_be_loaded_there(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    state = trained("sd15", targets=FEW, use_dora=True).state
    with_one, without = (
        model_card(
            facts, files, [], pipeline_class="StableDiffusionPipeline", names=SD15, state=state
        )
        for files in (FILES, FILES[:2])
    )

    assert "- ComfyUI: put `astronaut_comfyui.safetensors`" in with_one
    assert "## Loading in user interfaces\n\n- Not ComfyUI, A1111, Forge and InvokeAI" in without
    assert "- ComfyUI: put" not in without


def test_the_card_lists_what_was_checked(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", targets=FEW)
    path = tmp_path / "outputs" / FILE_NAME
    write_diffusers(path, adapter.state, torch.float32)
    checks, _ = run_verification(tmp_path, [("diffusers_lora", path)], adapter)

    card = model_card(
        facts,
        FILES,
        checks,
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=adapter.state,
    )

    rows = [line for line in card.splitlines() if line.startswith(f"| `{FILE_NAME}`")]
    assert len(rows) == len(checks) == 2
    assert all("passed" in row for row in rows)


def test_the_card_holds_no_place_and_is_the_same_every_time(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    state = trained("sd15", targets=FEW).state

    cards = {
        model_card(
            facts, FILES, [], pipeline_class="StableDiffusionPipeline", names=SD15, state=state
        )
        for _ in range(2)
    }

    assert len(cards) == 1
    assert "private" not in cards.pop()


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        *(("sd15", each) for each in ("lora", "lokr", "loha")),
        *((family, each) for family in ("flux", "flux2") for each in ("lora", "lokr", "loha")),
    ],
)
def test_the_cards_code_loads_the_adapter(
    family: str,
    algorithm: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    targets = FEW if family == "sd15" else ("to_k", "to_v", "linear_in")
    adapter = trained(family, algorithm, targets=targets, alpha=2)
    write_diffusers(tmp_path / FILE_NAME, adapter.state, torch.float32)
    here = replace(facts, base_model=folder.name)
    card = model_card(
        here,
        FILES,
        [],
        pipeline_class=type(adapter.base).__name__,
        names=adapter.names,
        state=adapter.state,
    )
    monkeypatch.chdir(tmp_path)

    pipeline = _run(card, folder)

    # diffusers 0.42.1: `load_lora_weights` has LoKr for FLUX.2, and LoHa for nothing.
    is_stock = algorithm == "lora" or (family, algorithm) == ("flux2", "lokr")
    assert ("load_lora_weights(" in card) is is_stock
    adapted = 0
    for component, layers in adapter.weights.items():
        for name, module in pipeline.components[component].named_modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
                torch.testing.assert_close(module.get_base_layer().weight.data, layers[name])
                adapted += 1
    assert adapted == sum(map(len, adapter.weights.values()))


@pytest.mark.parametrize(
    ("family", "files", "section", "place"),
    [
        (
            "sd15",
            "ComfyUI, A1111, Forge, InvokeAI, sd-scripts and LyCORIS",
            "ComfyUI, A1111, Forge and InvokeAI",
            3,
        ),
        (
            "flux",
            "ComfyUI, Forge, InvokeAI, sd-scripts and LyCORIS",
            "ComfyUI, Forge and InvokeAI",
            2,
        ),
        ("flux2", "ComfyUI, musubi-tuner and LyCORIS", "ComfyUI", 1),
    ],
)
def test_the_card_names_programs_that_read_the_family(
    family: str, files: str, section: str, place: int, facts: TrainingFacts
) -> None:
    card = model_card(facts, FILES, [], pipeline_class="A", names=TABLES[family], state=None)

    assert f"- `astronaut.safetensors`: the adapter for {files}\n" in card
    assert f"## Loading in {section}\n" in card
    assert card.count("into `models/") == place
    assert ("A1111" in card) is (family == "sd15")


def test_the_card_says_what_to_do_with_which_file_in_each_program(facts: TrainingFacts) -> None:
    card = model_card(facts, FILES, [], pipeline_class="A", names=SD15, state=None)

    assert "- ComfyUI: put `astronaut_comfyui.safetensors` into `models/loras`" in card
    assert "- A1111: put `astronaut.safetensors` into `models/Lora`" in card
    assert "by `<lora:astronaut:1>` in the prompt" in card
    assert "- Forge: put `astronaut_comfyui.safetensors` into `models/Lora`" in card
    assert "- InvokeAI: in the Model Manager" in card
    assert "install `astronaut.safetensors`" in card


@pytest.mark.parametrize(
    ("family", "algorithm", "use_dora", "misreading"),
    [
        ("sd15", "lora", False, ""),
        # `dora_scale` by columns there: InvokeAI#9517; A1111's `apply_weight_decompose`.
        ("sd15", "lora", True, "A1111 and InvokeAI"),
        ("sd15", "lokr", False, ""),
        # Its layers keep their diffusers names in the file.
        ("flux", "lokr", False, "InvokeAI"),
    ],
)
def test_the_card_names_programs_that_read_a_form_of_adapter_otherwise(
    family: str,
    algorithm: str,
    use_dora: bool,
    misreading: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
) -> None:
    targets = FEW if family == "sd15" else ("to_k", "to_v")
    state = trained(family, algorithm, targets=targets, use_dora=use_dora).state

    card = model_card(facts, FILES, [], pipeline_class="A", names=TABLES[family], state=state)

    told = [line for line in card.splitlines() if line.startswith("- Not ")]
    assert [line.partition(":")[0] for line in told] == ([f"- Not {misreading}"] * bool(misreading))


def test_the_card_says_what_was_in_few_bits_while_it_learnt(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    settings = {"quantization": "nf4", "weights_dtype": "bf16"}
    few = replace(facts, settings=settings)
    none = replace(facts, settings={"quantization": "none", "weights_dtype": "fp32"})
    state = trained("sd15", targets=FEW).state

    adapter, full, plain, wide = (
        model_card(each, [], [], pipeline_class="A", names=SD15, state=what)
        for each, what in [(few, state), (few, None), (none, state), (none, None)]
    )

    assert "was kept in `nf4` while the adapter learnt" in adapter
    assert "bf16" not in adapter
    assert "learnt in bf16" in full
    assert "nf4" not in full
    assert not [card for card in (plain, wide) if " learnt" in card]


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
    card = model_card(
        here, files, [], pipeline_class="StableDiffusionPipeline", names=SD15, state=None
    )
    monkeypatch.chdir(tmp_path)

    pipeline = _run(card, sd15_folder)

    found = pipeline.unet.state_dict()
    assert all(torch.equal(found[name], changed[name]) for name in changed)


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("sd15", "diffusers"), ("sd15", "eos"), ("sdxl", "eos"), ("flux", "eos")],
)
def test_the_cards_code_loads_adapter_and_new_tokens(
    family: str,
    pooling: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    adapter = trained(family, targets=FEW if family != "flux" else ("to_k", "to_v"))
    here = replace(_with_tokens(facts, pooling), base_model=folder.name)
    rows = {
        component: torch.randn(2, _width(adapter.base.components[component]))
        for component in adapter.names.embedding_keys
    }
    write_diffusers(tmp_path / FILE_NAME, adapter.state, torch.float32)
    written = list(write_token_files(tmp_path, rows, adapter.names, here))
    files = [CardFile("diffusers_lora", FILE_NAME)]
    files += [CardFile(role, path.name) for role, path, _ in written]
    class_name = type(adapter.base).__name__
    card = model_card(
        here, files, [], pipeline_class=class_name, names=adapter.names, state=adapter.state
    )
    monkeypatch.chdir(tmp_path)

    pipeline = _run(card, folder)

    for component, expected in rows.items():
        tokenizer = pipeline.components[component.replace("text_encoder", "tokenizer")]
        encoder = pipeline.components[component]
        ids = tokenizer.convert_tokens_to_ids(["<s0>", "<s1>"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], expected)
        if pooling == "eos" and "CLIP" in type(encoder).__name__:
            assert _pooled_id(encoder) == tokenizer.eos_token_id
    denoiser = pipeline.components[adapter.names.denoiser]
    assert any(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    assert 'pipe(prompt="a \\"<s0><s1>\\" portrait: in space")' in card


def test_new_tokens_of_t5_are_for_interfaces_that_know_them(facts: TrainingFacts) -> None:
    files = [
        CardFile("embeddings", "astronaut_emb.safetensors"),
        CardFile("token_embedding", "astronaut_TOK.safetensors"),
    ]
    with_tokens = _with_tokens(facts, "diffusers")

    card = model_card(with_tokens, files, [], pipeline_class="A", names=TABLES["flux"], state=None)

    # Forge's engine for T5 looks up no embeddings; ComfyUI's tokenizer has the key `t5xxl`.
    (row,) = [line for line in card.splitlines() if line.startswith("| `TOK`")]
    assert row.endswith("| `astronaut_TOK.safetensors` | `embedding:astronaut_TOK` |")
    assert "`clip_l` for `text_encoder` and `t5xxl` for `text_encoder_2`" in card
    assert "Forge" not in card


def _width(encoder: torch.nn.Module) -> int:
    return encoder.get_input_embeddings().weight.shape[1]


def _with_tokens(facts: TrainingFacts, pooling: str) -> TrainingFacts:
    return replace(
        facts,
        tokens={"TOK": ("<s0>", "<s1>")},
        token_prompts=('a "<s0><s1>" portrait: in space',),
        settings={**facts.settings, "ti_pooling": pooling},
    )


def _pooled_id(encoder: torch.nn.Module) -> int:
    """The id at which a text model takes its pooled vector."""
    (found,) = {m.eos_token_id for m in encoder.modules() if hasattr(m, "eos_token_id")}
    return found


@pytest.mark.parametrize("pooling", ["diffusers", "eos"])
def test_the_card_says_how_to_name_the_new_tokens_and_where_clip_pools(
    pooling: str, trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    files = [
        CardFile("embeddings", "astronaut_emb.safetensors"),
        CardFile("token_embedding", "astronaut_TOK.safetensors"),
    ]

    card = model_card(
        _with_tokens(facts, pooling),
        files,
        [],
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=trained("sd15", targets=FEW).state,
    )

    (row,) = [line for line in card.splitlines() if line.startswith("| `TOK`")]
    assert row == (
        "| `TOK` | `<s0><s1>` | `astronaut_TOK.safetensors` | `embedding:astronaut_TOK` | "
        "`astronaut_TOK` |"
    )
    assert f"`ti_pooling: {pooling}`" in card


def test_a_card_without_new_tokens_does_not_speak_of_them(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    card = model_card(
        facts,
        FILES,
        [],
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=trained("sd15", targets=FEW).state,
    )

    assert "New tokens" not in card
    assert "ti_pooling" not in card


def test_the_card_names_the_prompt_of_every_concept(facts: TrainingFacts) -> None:
    several = replace(facts, instance_prompts=("a TOK1", "a TOK2"))
    tokens = {"TOK1": ("<s0>",), "TOK2": ("<s1>",)}
    with_tokens = replace(several, tokens=tokens, token_prompts=("a <s0>", "a <s1>"))
    files = [*WHOLE, CardFile("embeddings", "astronaut_emb.safetensors")]
    files += [CardFile("token_embedding", f"astronaut_{name}.safetensors") for name in tokens]

    plain, pivotal = (
        model_card(
            each, listed, [], pipeline_class="StableDiffusionPipeline", names=SD15, state=None
        )
        for each, listed in [(several, WHOLE), (with_tokens, files)]
    )

    assert "Prompts it was trained with:\n\n- `a TOK1`\n- `a TOK2`\n" in plain
    assert front_matter(plain)["instance_prompt"] == "a TOK1"
    for card, prompts in [(plain, ["a TOK1", "a TOK2"]), (pivotal, ["a <s0>", "a <s1>"])]:
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
        asked: list[str] = []
        made = SimpleNamespace(images=["a picture"])
        scope = {"pipe": lambda prompt, asked=asked, made=made: asked.append(prompt) or made}
        exec("prompts = " + code.split("prompts = ")[1], scope)
        assert asked == prompts
        assert len(scope["images"]) == 2


def test_a_card_of_a_training_without_prompts_names_none(facts: TrainingFacts) -> None:
    card = model_card(
        replace(facts, instance_prompts=()),
        FILES,
        [],
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=None,
    )

    assert "it was trained with" not in card
    assert "instance_prompt" not in front_matter(card)


def test_the_card_tells_rank_and_alpha_of_text_encoders_of_their_own_strength(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts
) -> None:
    state = trained("sd15", targets=FEW, alpha=2, text=Strength(8, 3.0)).state

    card = model_card(
        facts, FILES, [], pipeline_class="StableDiffusionPipeline", names=SD15, state=state
    )

    assert "of rank 4 and 8 for" in card
    assert "| alpha of `unet` | 2 (folded into the weights) |" in card
    assert "| rank of `text_encoder` | 8 |" in card


def test_the_cards_code_loads_whole_text_encoders(
    facts: TrainingFacts,
    trained: Callable[..., TrainedAdapter],
    sdxl_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = trained("sdxl", targets=FEW)
    files, changed = [], {}
    for component in ("text_encoder", "text_encoder_2"):
        model = adapter.base.components[component]
        changed[component] = {n: p.detach() + 1 for n, p in model.named_parameters()}
        write_text_encoder(
            tmp_path / component, changed[component], model.config.to_dict(), torch.float32
        )
        files.append(CardFile(f"{component}_weights", f"{component}/model.safetensors"))
    here = replace(facts, base_model=sdxl_folder.name)
    card = model_card(
        here,
        files,
        [],
        pipeline_class="StableDiffusionXLPipeline",
        names=adapter.names,
        state=None,
    )
    monkeypatch.chdir(tmp_path)

    pipeline = _run(card, sdxl_folder)

    assert "All weights of `text_encoder` and `text_encoder_2`" in card
    for component, tensors in changed.items():
        model = pipeline.components[component]
        assert all(torch.equal(model.get_parameter(n), tensor) for n, tensor in tensors.items())


def test_the_card_says_what_an_extracted_lora_misses(facts: TrainingFacts) -> None:
    base = {"a.weight": torch.zeros(4, 4), "a.bias": torch.zeros(4)}
    after = {"a.weight": torch.eye(4), "a.bias": torch.tensor([1.0, 0, 0, 0])}
    extraction = drained(extract({"unet": base}, {"unet": after}, {"unet": {"a"}}, rank=3))
    files = [
        CardFile("denoiser_weights", "unet/diffusion_pytorch_model.safetensors"),
        *FILES[:2],
        CardFile("extraction_report", "extraction.json"),
    ]

    card = model_card(
        facts,
        files,
        [],
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=None,
        extraction=extraction,
    )

    # One of four equal singular values is lost; the bias has one of five equal squares.
    assert "50.0% of its size" in card
    assert "they carry 20.0% of the squared change" in card
    assert f'`pipe.load_lora_weights(".", weight_name="{FILE_NAME}")`' in card
    assert 'pipe.unet = type(pipe.unet).from_pretrained("unet", dtype=' in card


def test_the_card_says_when_there_was_nothing_to_extract(facts: TrainingFacts) -> None:
    base = {"unet": {"a.weight": torch.zeros(4, 4)}}
    files = [CardFile("extraction_report", "extraction.json")]

    card = model_card(
        facts,
        files,
        [],
        pipeline_class="StableDiffusionPipeline",
        names=SD15,
        state=None,
        extraction=drained(extract(base, base, {"unet": {"a"}}, rank=3)),
    )

    assert "There is none: no layer changed." in card


def _run(card: str, base: Path) -> object:
    """Runs the card's Python up to the picture, in the format of the weights; its pipeline."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert f"path/to/{base.name}" in code
    code = code.replace(f"path/to/{base.name}", str(base)).replace("bfloat16", "float32")
    scope: dict[str, object] = {}
    exec(code.split("image = ")[0], scope)
    return scope["pipe"]
