"""What is found in pictures and written about them before training: faces and captions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.fields import Section, Text


class FaceConfig(Section):
    """Faces: how they are found, cut out and restored."""

    face_detector: Literal["auto", "yunet", "haar"] = Field(
        "auto",
        description="What finds faces: the network YuNet, or OpenCV's own cascades, which miss "
        "tilted and small ones. auto: YuNet where its file can be had (ours).",
    )
    face_detector_path: Text | None = Field(
        None, description="YuNet's .onnx file. None: fetched once and kept (ours)."
    )
    face_crop_region: float | None = Field(
        None,
        gt=0,
        description="Cut each picture to a square of this many times its largest face first; "
        "1 is the face itself, 1.4 a portrait. None: the whole picture (Novita).",
    )
    face_restore: Literal["gfpgan_1.4"] | None = Field(
        None, description="Redraw small faces by this model; needs the extra restore (Novita)."
    )
    face_restore_upscale: float = Field(
        1.0, ge=1, le=4, description="Enlarge pictures with restored faces so many times (Novita)."
    )
    face_restorer_path: Text | None = Field(
        None, description="Weights of face_restore. None: fetched once and kept (ours)."
    )


class CaptionConfig(Section):
    """Captions that a model writes for pictures without one."""

    captioner: Text = Field(
        "auto",
        description="Model that writes captions: llava, joycaption, qwen3-vl-8b, qwen3-vl-2b, "
        "florence-2, blip, a hub id or a local folder. auto: the best that this machine can "
        "run (ours).",
    )
    caption_mode: Literal["plain", "character", "product", "style", "general"] = Field(
        "plain",
        description="What captions tell: all that is seen (plain, general), or all but what the "
        "token must learn: a person, a product, a style (BFL's mode).",
    )
    captioner_load_in_4bit: bool | None = Field(
        None,
        description="Load the captioner in 4 bits. None: where it does not fit otherwise (ours).",
    )
    add_trigger: bool = Field(
        False,
        description="Put the token in front of the user's own captions that lack it (ours).",
    )
