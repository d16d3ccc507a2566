"""Novita's training of subjects and styles: its request, its defaults, and its answer.

From the service's pages, and from what its client sends: null for every field that is not set, and
numbers as text. The pages give no machine defaults but "500 is enough" for the steps; the others
are the value that the pages list first, or what is usual for a LoRA of this kind.

An `assets_id` is a location here: whoever has given pictures ids puts their places in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from trainer import dialects
from trainer.config import Note, TrainingConfig
from trainer.contracts import judged, missing, without_nulls
from trainer.errors import Problem
from trainer.fields import PREPARATION_STEPS
from trainer.job import Result, ResultFile
from trainer.known_models import known_model, known_models
from trainer.leaves import leaf_schema, nearest, shown
from trainer.picture_lists import ListedPicture, is_picture_list, listed_pictures, picture_list
from trainer.resolve import Layer
from trainer.sections.data import in_order
from trainer.sections.running import SchedulerName

NAMES: Mapping[str, Mapping[str, Any]] = {
    "novita": {"task_type": "subject"},
    "novita-subject": {"task_type": "subject"},
    "novita-style": {"task_type": "style"},
}
SERVICE = "Novita's training"
BASE_MODELS = (
    *("stable-diffusion-xl-base-1.0", "dreamshaperXL09Alpha_alpha2Xl10_91562"),
    *("protovisionXLHighFidelity3D_release0630Bakedvae_154359", "v1-5-pruned-emaonly"),
    *("epicrealism_naturalSin_121250", "chilloutmix_NiPrunedFp32Fix"),
    *("abyssorangemix3AOM3_aom3a3_10864", "dreamshaper_8_93211", "WFChild_v1.0"),
    *("majichenmixrealistic_v10", "realisticVisionV51_v51VAE_94301"),
    *("sdxlUnstableDiffusers_v11_216694", "realisticVisionV40_v40VAE_81510"),
    *("epicrealismXL_v10_247189", "somboy_v10_172675", "yesmixXL_v10_283329"),
    "animagineXLV31_v31_325600",
)

# Service field to leaf, and service field to the reason why it is not taken; one in a group as
# `group.field`, an argument of a component as `components.component.argument`.
_SAME = (
    *("instance_prompt", "class_prompt", "max_train_steps", "learning_rate", "seed"),
    *("lr_scheduler", "lr_warmup_steps", "with_prior_preservation", "prior_loss_weight"),
    *("train_text_encoder", "batch_size"),
)
RENAMED: Mapping[str, str] = {
    **{f"expert_setting.{name}": name for name in _SAME},
    "task_type": "caption_mode",
    "name": "output_name",
    "base_model": "model_url",
    "width": "resolution_width",
    "height": "resolution_height",
    "image_dataset_items": "images_data_url",
    "expert_setting.lora_r": "rank",
    "expert_setting.lora_alpha": "alpha",
    "expert_setting.lora_text_encoder_r": "text_encoder_rank",
    "expert_setting.lora_text_encoder_alpha": "text_encoder_alpha",
    "expert_setting.train_batch_size": "batch_size",
    "components": "preparation_order",
    "components.face_crop_region.ratio": "face_crop_region",
    "components.face_restore.method": "face_restore",
    "components.face_restore.upscale": "face_restore_upscale",
    "components.resize.width": "resize_width",
    "components.resize.height": "resize_height",
}
# A leaf of a component has its place in the list, which differs.
FIELDS = {
    **dialects.named(RENAMED, {}),
    **{leaf: "components" for field, leaf in RENAMED.items() if field.startswith("components.")},
}
NOT_USED: Mapping[str, str] = {}
_EXPERT = "expert_setting."
_STYLE = "style"
_ONLY: Mapping[str, Any] = {
    "use_lora": True,
    "lora_type": "lora",
    "use_dora": False,
    "train_text_encoder_ti": False,
}
_DEFAULTS: Mapping[str, Any] = {
    **_ONLY,
    "instance_prompt": "a close photo of ohwx person",
    "class_prompt": "person",
    "max_train_steps": 500,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "rank": 8,
    "batch_size": 1,
    "skip_caption_generation": True,
}
# What a component without arguments does.
_COMPONENT_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "face_crop_region": {"ratio": "1"},
    "face_restore": {"method": "gfpgan_1.4"},
    "resize": {},
}
# Component to its arguments, each with what reads it.
_ARGUMENTS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "face_crop_region": {"ratio": float},
    "face_restore": {"method": str, "upscale": float},
    "resize": {"width": int, "height": int},
}
_SIDES = ("width", "height")
_RATES = (1e-4, 1e-5, 1e-6, 2e-4, 5e-5)
_MOST_PICTURES, _LONGEST_CAPTION = 50, 1024
_CAPTION = f"text of 1 to {_LONGEST_CAPTION} characters"
_WORDS = {
    "image_dataset_items": f"a list of 1 to {_MOST_PICTURES} pictures, each with assets_id",
    "image_dataset_items[].assets_id": "the id of a picture, or its path or address",
    "image_dataset_items[].caption": _CAPTION,
    "expert_setting": "names with values",
    "expert_setting.learning_rate": "one of 1e-4, 1e-5, 1e-6, 2e-4, 5e-5",
    "components": "a list of components, each with name and args",
    "components[].args": "a list of arguments, each with name and value",
    "components[].args[].value": "text or a number",
}


def _listed_rate(value: float) -> float:
    if value not in _RATES:
        raise ValueError("not a rate of the service")
    return value


def _as_text(value: object) -> object:
    """A number as text; anything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


class Picture(BaseModel):
    """A picture of the data set."""

    assets_id: Annotated[str, BeforeValidator(_as_text)] = Field(
        min_length=1, description="Id of an uploaded picture."
    )
    caption: str | None = Field(
        None, min_length=1, max_length=_LONGEST_CAPTION, description="Caption; styles need one."
    )


class Argument(BaseModel):
    """An argument of a component."""

    name: str
    value: Annotated[str, BeforeValidator(_as_text)]


class Component(BaseModel):
    """A step of the pictures' preparation."""

    name: Literal["face_crop_region", "resize", "face_restore"]
    args: list[Argument] = []


class ExpertSetting(BaseModel):
    """How the training goes; text that is a number is one."""

    instance_prompt: str | None = Field(None, min_length=1)
    class_prompt: str | None = Field(None, min_length=1)
    max_train_steps: int | None = Field(None, ge=1)
    learning_rate: Annotated[float, AfterValidator(_listed_rate)] | None = None
    seed: int | None = Field(None, ge=1)
    lr_scheduler: SchedulerName | None = None
    lr_warmup_steps: int | None = Field(None, ge=0)
    with_prior_preservation: bool | None = None
    prior_loss_weight: float | None = Field(None, ge=0)
    lora_r: int | None = Field(None, ge=4, le=128)
    lora_alpha: int | None = Field(None, ge=4, le=128)
    lora_text_encoder_r: int | None = Field(None, ge=4, le=128)
    lora_text_encoder_alpha: int | None = Field(None, ge=4, le=128)
    train_batch_size: int | None = Field(None, ge=1, le=4)
    batch_size: int | None = Field(None, ge=1, le=4, description="Another name of the pages.")
    train_text_encoder: bool | None = None


class Input(BaseModel):
    """A training request."""

    task_type: Literal["subject", "style"] = Field(
        "subject", description="What is trained; the service's address says it."
    )
    name: str = Field(min_length=1, description="Name of the task.")
    base_model: str = Field(min_length=1, description="Base model, by the service's name of it.")
    width: int = Field(ge=1, description="Trained width.")
    height: int = Field(ge=1, description="Trained height.")
    image_dataset_items: list[Picture] = Field(
        min_length=1, max_length=_MOST_PICTURES, description="Pictures."
    )
    expert_setting: ExpertSetting = Field(ExpertSetting(), description="Expert parameters.")
    components: list[Component] = Field([], description="Steps of the preparation, in order.")


class TrainedModel(BaseModel):
    """A trained model."""

    model_name: str
    model_status: Literal["DEPLOYING", "SERVING"] = "SERVING"


class Extra(dialects.LoraFiles):
    """What the service tells beside; the files are this project's own."""

    progress_percent: int = 100
    eta_relative: int = 0


class Output(BaseModel):
    """What the service answers for a task that is done."""

    task_id: str | None = Field(None, description="Of the task, where a server gives it one.")
    task_status: Literal["SUCCESS"] = "SUCCESS"
    model_type: Literal["lora"] = "lora"
    models: list[TrainedModel]
    extra: Extra
    ignored_options: dialects.IGNORED = None


def to_layers(payload: Mapping[str, Any]) -> list[Layer]:
    """The defaults, then the request's own fields; what the service would refuse is a problem."""
    found = judged(payload, Input, SERVICE, words=_WORDS, not_used=NOT_USED)
    given = {**found.given, **_sizes(found.given)}
    problems = [*_lacking_captions(given), *_wrong_pictures(given), *_unknown_base(given)]
    placed, components = _placed(given), _components(found.given)
    if any(problem.field.startswith("image") for problem in problems):
        del placed["images_data_url"]
    request = Layer(
        "request",
        {**placed, **components.values},
        explicit=True,
        notes=[*_size_notes(found.given, given), *components.notes],
        problems=[*problems, *components.problems],
        wrong={"images_data_url"} - placed.keys(),
        fields=components.fields,
    )
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in request.values}
    return dialects.two_layers(SERVICE, defaults, request, found, RENAMED)


def to_output(result: Result, url_for: Callable[[ResultFile], str]) -> Output:
    """The service's answer for a finished run; ids and names of models are a server's own."""
    answer = dialects.described(result, dialects.LORA_ROLES, url_for, FIELDS)
    ignored = answer.pop("ignored_options")
    lora = answer.get("kohya_lora_file") or answer.get("diffusers_lora_file")
    models = [TrainedModel(model_name=lora["file_name"])] if lora else []
    return Output(models=models, extra=Extra.model_validate(answer), ignored_options=ignored)


def to_request(config: TrainingConfig) -> dict[str, Any]:
    """The request for the same training, see `Dialect`."""
    values = config.values()
    names = [name for name in BASE_MODELS if dialects.is_base(values["model_url"], name)]
    expert = {
        name.removeprefix(_EXPERT): values[leaf]
        for name, leaf in RENAMED.items()
        if name.startswith(_EXPERT) and name != f"{_EXPERT}batch_size"
    }
    request = {
        "task_type": _STYLE if values["caption_mode"] == _STYLE else "subject",
        "name": values["output_name"],
        "base_model": names[0] if names else values["model_url"],
        "width": values["resolution_width"],
        "height": values["resolution_height"],
        "image_dataset_items": _items(values["images_data_url"]),
        "expert_setting": without_nulls(expert),
        "components": _components_of(values),
    }
    problems = dialects.only_one_subject(config, SERVICE) + dialects.only_listed(config, SERVICE)
    problems += dialects.only_these(config, _ONLY, SERVICE)
    if not names:
        message = f"got {shown(values['model_url'])}, which {SERVICE} does not take; allowed: "
        problems.append(Problem("model_url", message + ", ".join(BASE_MODELS)))
    return dialects.sayable(
        request, Input, SERVICE, words=_WORDS, leaf_of=_leaf_of, problems=problems
    )


def _items(images: str | None) -> Any:
    """The pictures as the service lists them; a location that is no list is one picture."""
    listed = [ListedPicture(images)] if images else []
    listed = [*listed_pictures(images)] if images and is_picture_list(images) else listed
    return without_nulls([{"assets_id": p.location, "caption": p.caption} for p in listed])


def _components_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the preparation; a resize to the trained size at the end goes without saying."""
    order = in_order(values["preparation_order"])
    resizes = [values["resize_width"], values["resize_height"]] != [None, None]
    is_said = {name: values.get(name) is not None for name in order}
    is_said["resize"] = resizes or order != PREPARATION_STEPS
    trained = {f"resize_{side}": values[f"resolution_{side}"] for side in _SIDES}
    found = []
    for name in filter(is_said.__getitem__, order):
        leaves = {a: RENAMED[f"components.{name}.{a}"] for a in _ARGUMENTS[name]}
        said = {a: values[leaf] or trained.get(leaf) for a, leaf in leaves.items()}
        args = [{"name": a, "value": str(value)} for a, value in said.items()]
        found.append({"name": name, "args": args})
    return found


def _placed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that the fields of a request mean, but for its components."""
    expert = ExpertSetting.model_validate(given.get("expert_setting", {}))
    placed = {RENAMED[_EXPERT + n]: v for n, v in expert.model_dump(exclude_none=True).items()}
    # The service's client has these two alone to ask for it.
    if {"text_encoder_rank", "text_encoder_alpha"} & placed.keys():
        placed.setdefault("train_text_encoder", True)
    placed |= {
        RENAMED[name]: given[name] for name in ("base_model", "width", "height") if name in given
    }
    if "base_model" in given and known_model(bare := _bare(given["base_model"])):
        placed["model_url"] = bare
    if given.get("task_type") == _STYLE:
        placed["caption_mode"] = _STYLE
    if name := dialects.file_name_of(given.get("name", "")):
        placed["output_name"] = name
    if "image_dataset_items" in given:
        items = [Picture.model_validate(item) for item in given["image_dataset_items"]]
        pictures = [ListedPicture(item.assets_id, item.caption) for item in items]
        placed["images_data_url"] = picture_list(pictures)
    return placed


def _lacking_captions(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of the pictures of a style without a caption."""
    items = given.get("image_dataset_items", []) if given.get("task_type") == _STYLE else []
    for place, item in enumerate(items):
        if "caption" not in item:
            field = f"image_dataset_items[{place}].caption"
            yield missing(field, f"{SERVICE} of styles", _CAPTION)


def _wrong_pictures(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of archives in the place of pictures."""
    items = given.get("image_dataset_items", [])
    places = [str(item["assets_id"]) for item in items]
    return dialects.archives_among(places, "image_dataset_items[{}].assets_id")


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
    """The trained width and height: those asked for, as near as pictures can be trained."""
    return {side: _trained_size(int(given[side])) for side in _SIDES if side in given}


def _trained_size(size: int) -> int:
    declared = leaf_schema("resolution_width")["anyOf"][0]
    step, smallest = int(declared["multipleOf"]), int(declared["minimum"])
    return max(smallest, (size + step // 2) // step * step)


def _size_notes(asked: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Note]:
    """Notes on sizes that are trained otherwise than asked for."""
    for side in _SIDES:
        if side in asked and int(asked[side]) != given[side]:
            message = f"{asked[side]} is trained as {given[side]}, the nearest that there is"
            yield Note(kind="warning", field=f"request.{side}", message=message)


def _bare(base_model: str) -> str:
    """The service's name of a base model, with or without the ending that its files have."""
    return base_model.removesuffix(".safetensors")


def _unknown_base(given: Mapping[str, Any]) -> Iterator[Problem]:
    """The problem of a base model that has no entry, and is no hub id or path."""
    name = given.get("base_model", "/")
    if "/" not in name and known_model(_bare(name)) is None:
        message = f"got {shown(name)} (in request); allowed: one of {', '.join(BASE_MODELS)}, "
        message += "a name in your own list of base models, a hub id, or a path"
        yield Problem("base_model", message, nearest(_bare(name), known_models()))


@dataclass
class _Components:
    """What the components of a request mean."""

    values: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def take(self, component: str, argument: str, text: str, place: str) -> None:
        """Takes an argument in, or tells what is wrong with it; without a place, a default."""
        readers = _ARGUMENTS[component]
        if argument not in readers:
            message = f"`{component}` has no such argument; it has {', '.join(readers)}"
            field = f"request.{place}.name"
            self.notes.append(Note(kind="ignored", field=field, message=message))
            return
        try:
            value = readers[argument](text)
        except ValueError:
            message = f"got {shown(text)}; allowed: a number"
            self.problems.append(Problem(f"{place}.value", message))
            return
        leaf = RENAMED[f"components.{component}.{argument}"]
        self.values[leaf] = value
        if place:
            self.fields[leaf] = f"{place}.value"


def _leaf_of(name: str) -> str:
    top = name.partition("[")[0]
    return RENAMED.get(name) or RENAMED.get(top) or top


def _components(request: Mapping[str, Any]) -> _Components:
    components = [Component.model_validate(each) for each in request.get("components", [])]
    names = [component.name for component in components]
    found = _Components()
    if len(set(names)) < len(names):
        twice = Problem("components", f"got {', '.join(names)}; allowed: each component once")
        found.problems.append(twice)
    elif in_order(names) != PREPARATION_STEPS:
        found.values["preparation_order"] = list(in_order(names))
    for place, component in enumerate(components):
        for argument, text in _COMPONENT_DEFAULTS[component.name].items():
            found.take(component.name, argument, text, "")
        for number, given in enumerate(component.args):
            within = f"components[{place}].args[{number}]"
            found.take(component.name, given.name, given.value, within)
    # What is brought to the size that is asked for comes to the trained one as well as it can.
    for side in filter(request.__contains__, _SIDES):
        leaf = RENAMED[f"components.resize.{side}"]
        if found.values.get(leaf) == int(request[side]):
            del found.values[leaf]
    return found
