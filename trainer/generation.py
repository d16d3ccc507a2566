"""Pictures to be made with a base model and what was trained on it: the request, as JSON.

A folder holds one request and, once it is done, its pictures and a `result.json` as a run has
it; whoever makes the pictures and whoever asks for them share nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.config import Note
from trainer.durable import write_text
from trainer.errors import InputError, Problem
from trainer.job import RunFolder
from trainer.leaves import shown

PictureFormat = Literal["png", "jpeg", "webp"]
# A run's change of its base model is taken at most so many times, forwards or backwards.
STRONGEST = 4.0
# What guides a picture beside its prompt: a depth map, edges, or a picture with a hole to fill.
Guide = Literal["depth", "canny", "fill"]


class Trained(BaseModel):
    """A finished run whose result changes the base model.

    Args:
        run: its folder.
        strength: s in W + s * ΔW, for an adapter and for fully trained weights alike; 0 is the
            base model, 1 the trained one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    run: str
    strength: float = Field(1.0, ge=-STRONGEST, le=STRONGEST)


class GenerationRequest(BaseModel):
    """Pictures to be made.

    Args:
        model: options of the configuration's model section, such as `model_url`. Empty: the base
            model of the first run in `trained`. Without `model_url`: that one, with these options.
        trained: what changes it: W + Σ sᵢ * ΔWᵢ, in any order.
        prompt: what the pictures show; identifiers such as TOK stand for the trained tokens.
        negative_prompt: what guidance leads away from. None: as the pipeline has it.
        width: in pixels. None: the base model's own, or the guiding picture's.
        height: in pixels, likewise.
        num_inference_steps: of denoising. None: as the pipeline has it.
        guidance_scale: None: as the pipeline has it.
        seed: picture n of the request is made from (seed, n).
        num_images: how many.
        output_format: of the files.
        clip_skip: how far from the end CLIP's text is taken, as A1111 counts: 1 is where the
            pipeline takes it, 2 one layer before. None: as 1.
        scheduler: sampler by the name of its diffusers class. None: the base model's own, which
            is also kept where this one does not fit it.
        karras: whether noise levels are spaced as Karras et al. 2022 do it, eq. 5.
        guide: kind of the guiding picture.
        guide_image: path or web address of the picture that guides: a depth map or a picture whose
            depth is measured, edges or a picture whose edges are found, a picture to be filled.
            It is made as large as the base model's own pictures, in its own shape.
        guide_mask: path or web address of the mask of a picture to be filled: white is made anew.
            None: what is transparent in the picture.
        canny_thresholds: low and high one of Canny's edge detector, which finds the edges of
            `guide_image`. None: it is a picture of edges already.
        depth_estimator: folder or hub id of the model that measures the depth of `guide_image`.
            None: it is a depth map already.
        notes: what whoever asks has to say of options that are not taken; told with the pictures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: dict[str, Any] = {}
    trained: tuple[Trained, ...] = ()
    prompt: str
    negative_prompt: str | None = None
    width: int | None = Field(None, ge=32)
    height: int | None = Field(None, ge=32)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    seed: int = Field(0, ge=0, le=2**63 - 1)
    num_images: int = Field(1, ge=1)
    output_format: PictureFormat = "png"
    clip_skip: int | None = Field(None, ge=1)
    scheduler: str | None = None
    karras: bool = False
    guide: Guide | None = None
    guide_image: str | None = None
    guide_mask: str | None = None
    canny_thresholds: tuple[int, int] | None = None
    depth_estimator: str | None = None
    notes: tuple[Note, ...] = ()

    @model_validator(mode="after")
    def _guides_agree(self) -> Self:
        if (self.guide is None) != (self.guide_image is None):
            raise ValueError("`guide` and `guide_image` come together")
        if self.guide_mask is not None and self.guide != "fill":
            raise ValueError("`guide_mask` is for `guide: fill`")
        if self.canny_thresholds is not None and self.guide != "canny":
            raise ValueError("`canny_thresholds` are for `guide: canny`")
        if self.depth_estimator is not None and self.guide != "depth":
            raise ValueError("`depth_estimator` is for `guide: depth`")
        return self


def strength_text(strength: float) -> str:
    """A strength in its shortest words: `0`, `0.5`, `1`."""
    return repr(float(strength)).removesuffix(".0")


def column_text(strength: float) -> str:
    """A strength as it stands above pictures, which says where the base model is."""
    return "0 (base)" if strength == 0 else strength_text(strength)


@dataclass(frozen=True)
class GenerationFolder:
    """The places inside the folder of one request; its result is where a run has its own."""

    root: Path

    @property
    def request(self) -> Path:
        """What is asked for."""
        return self.root / "generation.json"

    @property
    def run(self) -> RunFolder:
        """Events, outputs and result."""
        return RunFolder(self.root)

    def write_request(self, request: GenerationRequest) -> None:
        """Leaves the request in the folder."""
        write_text(self.request, request.model_dump_json(indent=2) + "\n")

    def read_request(self) -> GenerationRequest:
        """The request in the folder.

        Raises:
            InputError: there is none, or with everything that is wrong with it.
        """
        try:
            content = self.request.read_bytes()
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            raise InputError.of(str(self.request), reason, "check the path") from error
        try:
            return GenerationRequest.model_validate_json(content)
        except ValidationError as error:
            raise InputError(problems_of(error, self.request.name)) from error


def problems_of(error: ValidationError, whole: str) -> list[Problem]:
    """What is wrong with a request.

    Args:
        error: as pydantic found it.
        whole: what the request as a whole is called.
    """
    return [
        Problem(
            ".".join(map(str, detail["loc"])) or whole,
            f"{detail['msg'].removeprefix('Value error, ')}, got {shown(detail['input'])}",
        )
        for detail in error.errors(include_url=False, include_context=False)
    ]
