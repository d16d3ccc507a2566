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
    """A cached latent shows one window of its picture; a mirrored twin is cached beside it.

    Where windows stand still, caching changes no result: it is left out only on purpose.
    """
    moving = _random_geometry(draft.values)
    if not moving and "cache_latents" not in draft.explicit:
        draft.values["cache_latents"] = True
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


def leave_size_to_priority(draft: Draft) -> None:
    """A priority says at which shares of the base model's own size pictures are trained.

    In a written configuration the size stands beside it that it came to there.
    """
    leaf = "priority"
    sides = [s for s in ("resolution_width", "resolution_height") if draft.values[s] is not None]
    sides = [s for s in sides if not (draft.is_written(s) and draft.is_written(leaf))]
    if draft.values[leaf] is None or not sides:
        return
    strongest = max(sides, key=draft.strength)
    if leaf in draft.explicit and strongest in draft.explicit:
        draft.clash(
            leaf,
            strongest,
            "the priority chooses sizes by the base model",
            f"set `{leaf}: null`, or leave the size to it",
        )
        draft.values[leaf] = None
    elif draft.strength(leaf) < draft.strength(strongest):
        draft.settle(leaf, None, f"`{strongest}` gives one size")
    else:
        for side in sides:
            draft.settle(side, None, f"`{leaf}` chooses sizes by the base model")


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
