"""Pictures, their captions and their windows: what must be given, and what goes together."""

from __future__ import annotations

from typing import Any

from trainer.errors import Problem
from trainer.leaves import shown
from trainer.rules.draft import Draft, Values


def require_pictures(draft: Draft) -> None:
    """Either images_data_url or concepts must say where the pictures are."""
    leaves = ("images_data_url", "concepts")
    if any(draft.values[leaf] or leaf in draft.wrong for leaf in leaves):
        return
    draft.problems.append(
        Problem(
            "images_data_url",
            "no training pictures are given; allowed: a folder, an archive, a URL or a data: URI",
            "set `images_data_url` to your pictures, or `concepts` for several subjects",
        )
    )


def leave_captions_to_concepts(draft: Draft) -> None:
    """A captions file belongs to one set of pictures; every concept names its own."""
    leaf = "captions_file_url"
    if draft.values["concepts"] is None or draft.values[leaf] is None:
        return
    if leaf not in draft.explicit:
        draft.settle(leaf, None, "`concepts` name captions files of their own")
        return
    got = f"got {shown(draft.values[leaf])} with `concepts`"
    allowed = "allowed: null, every concept names a captions file of its own"
    hint = f"move it into the concept that it belongs to, as `concepts[0].{leaf}`"
    draft.problems.append(Problem(leaf, f"{got}; {allowed}", hint))
    draft.values[leaf] = None


def _random_geometry(values: Values) -> dict[str, Any]:
    """The leaves that move a picture differently each time, with the values that stop it."""
    turning = values["random_rotation_start"] < values["random_rotation_end"]
    moving = {
        "center_crop": (not values["center_crop"] and not values["face_aware_cropping"], True),
        "random_crop_offset_x": (values["random_crop_offset_x"] > 0, 0),
        "random_crop_offset_y": (values["random_crop_offset_y"] > 0, 0),
        "random_rotation_start": (turning, 0),
        "random_rotation_end": (turning, 0),
    }
    return {leaf: still for leaf, (moves, still) in moving.items() if moves}


def hold_cached_windows(draft: Draft) -> None:
    """A cached latent shows one window of its picture; a mirrored twin is cached beside it."""
    moving = _random_geometry(draft.values)
    if not draft.values["cache_latents"] or not moving:
        return
    strongest = max(moving, key=draft.strength)
    if "cache_latents" in draft.explicit and strongest in draft.explicit:
        for leaf in sorted(set(moving) & draft.explicit):
            draft.clash(
                leaf,
                "cache_latents",
                "a cached latent shows one fixed window",
                f"set `cache_latents: false` or `{leaf}: {shown(moving[leaf])}`",
            )
        return
    if draft.strength("cache_latents") < draft.strength(strongest):
        why = f"`{strongest}` changes the picture each time"
        draft.settle("cache_latents", False, why)
        return
    for leaf, still in moving.items():
        draft.settle(leaf, still, "`cache_latents` stores one fixed window of each picture")


def choose_buckets(draft: Draft) -> None:
    """Where no size is asked for, each picture is trained at its own aspect."""
    if draft.values["enable_bucket"] is None:
        sizes = draft.values["resolution_width"], draft.values["resolution_height"]
        draft.values["enable_bucket"] = sizes == (None, None)


def square_one_sided_size(draft: Draft) -> None:
    """A width without a height means a square, and the other way round."""
    for leaf, other in (
        ("resolution_width", "resolution_height"),
        ("resolution_height", "resolution_width"),
    ):
        if draft.values[leaf] is None and draft.values[other] is not None:
            draft.settle(leaf, draft.values[other], f"only `{other}` is given")
