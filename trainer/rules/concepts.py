"""Several subjects in one training: their identifiers, and the class that a prior needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from trainer.config import Concept
from trainer.errors import Problem
from trainer.leaves import allowed, shown
from trainer.rules.draft import Draft
from trainer.sections.subjects import concepts_of, renamed, subjects_of

FIRST_IDENTIFIER = "TOK"


def give_identifiers(draft: Draft) -> None:
    """Every concept gets its token, and token_abstraction holds them all.

    Identifiers that were set on purpose are handed out by place. Otherwise those of the concepts
    decide: a concept that names none is called TOK, TOK1 and so on by its place. Two concepts
    may share a token: two sets of pictures of one subject.
    """
    concepts = draft.values["concepts"]
    if concepts is None:
        return
    if "token_abstraction" in draft.explicit:
        tokens = _handed_out(draft, concepts)
    else:
        tokens = _invented(concepts)
        _rename(draft, tuple(dict.fromkeys(tokens)))
    draft.values["concepts"] = tuple(
        concept.model_copy(update={"token": token})
        for concept, token in zip(concepts, tokens, strict=True)
    )


def require_class(draft: Draft) -> None:
    """Prior preservation needs a class: photo_class or class_prompt."""
    if draft.wrong & {"photo_class", "class_prompt", "concepts"}:
        return
    subjects = subjects_of(draft.values)
    with_prior = [
        place for place, subject in enumerate(subjects) if subject.with_prior_preservation
    ]
    nameless = [place for place in with_prior if subjects[place].class_prompt is None]
    if not nameless:
        return
    everywhere = nameless == with_prior and draft.values["with_prior_preservation"]
    fields = (
        ["photo_class"]
        if everywhere or draft.values["concepts"] is None
        else [f"concepts[{place}].photo_class" for place in nameless]
    )
    classes = allowed("photo_class").removesuffix(", or null")
    for field in fields:
        prompt = field.replace("photo_class", "class_prompt")
        draft.problems.append(
            Problem(
                field,
                f"got null, and with_prior_preservation is true; allowed: {classes}",
                f"set `{field}`, or `{prompt}` to the words for another class, "
                "or `with_prior_preservation: false`",
            )
        )


def warn_of_prompts_without_identifier(draft: Draft) -> None:
    """New tokens learn only from captions that name them."""
    values = draft.values
    if not values["train_text_encoder_ti"] or not values["skip_caption_generation"]:
        return
    identifiers = values["token_abstraction"]
    subjects = subjects_of(values)
    names = identifiers if values["concepts"] is None else None
    bare = [
        place
        for place, subject in enumerate(subjects)
        if subject.captions_file_url is None
        and not _names_one(str(subject.instance_prompt), names or [str(subject.token)])
    ]
    own = [place for place in bare if concepts_of(values)[place].instance_prompt is not None]
    reason = "pictures without a caption of their own do not teach the new tokens"
    if len(own) < len(bare):
        listed = ", ".join(f"`{name}`" for name in identifiers)
        message = f"{shown(values['instance_prompt'])} names no identifier ({listed}): {reason}"
        draft.note("warning", "instance_prompt", message)
    if own:
        listed = ", ".join(f"`concepts[{place}].instance_prompt`" for place in own)
        draft.note("warning", "concepts", f"{listed}: the concept's token does not occur: {reason}")


def _names_one(prompt: str, identifiers: Sequence[str]) -> bool:
    return any(renamed(prompt, name, "") != prompt for name in identifiers)


def _handed_out(draft: Draft, concepts: Sequence[Concept]) -> list[str]:
    names = draft.values["token_abstraction"]
    tokens = []
    for place, concept in enumerate(concepts):
        token = concept.token or (names[place] if place < len(names) else None)
        if token is None or token not in names:
            leaf = f"concepts[{place}].token"
            message = f"got {shown(token)} with `token_abstraction` {shown(names)}"
            hint = f"add an identifier to `token_abstraction`, or set `{leaf}` to one of them"
            choices = f"one of {', '.join(names)}"
            draft.problems.append(Problem(leaf, f"{message}; allowed: {choices}", hint))
            token = names[0]
        tokens.append(token)
    return tokens


def _invented(concepts: Sequence[Concept]) -> list[str]:
    """The concepts' own tokens; TOK and the place, or the next free number, for the others."""
    tokens: list[str] = []
    for place, concept in enumerate(concepts):
        taken = {*tokens, *(other.token for other in concepts)}
        names = (f"{FIRST_IDENTIFIER}{number or ''}" for number in count(place))
        tokens.append(concept.token or next(name for name in names if name not in taken))
    return tokens


def _rename(draft: Draft, names: tuple[str, ...]) -> None:
    """The concepts' identifiers in place of those that nobody chose, also in the prompt."""
    old = draft.values["token_abstraction"][0]
    draft.settle("token_abstraction", names, "these are the tokens of `concepts`")
    prompt = draft.values["instance_prompt"]
    reason = f"`{old}` stands for the token of each concept, the first of which is `{names[0]}`"
    if not _names_one(prompt, names[:1]):
        draft.settle("instance_prompt", renamed(prompt, old, names[0]), reason)
