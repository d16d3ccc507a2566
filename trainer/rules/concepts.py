"""Several subjects in one training: their identifiers, and the class that a prior needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from trainer.config import Concept
from trainer.errors import Problem
from trainer.leaves import allowed, shown
from trainer.rules.draft import Draft
from trainer.sections.subjects import (
    concepts_of,
    fields_of_concept,
    inherits,
    renamed,
    subjects_of,
    words,
)

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


def name_identifier_in_prompt(draft: Draft) -> None:
    """A prompt that nobody chose and that names no identifier is about the first one."""
    prompt, names = draft.values["instance_prompt"], draft.values["token_abstraction"]
    if "instance_prompt" in draft.explicit or words(names).search(prompt):
        return
    reason = f"`{FIRST_IDENTIFIER}` stands for the identifier, which is `{names[0]}`"
    draft.settle("instance_prompt", renamed(prompt, FIRST_IDENTIFIER, names[0]), reason)


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


def refuse_identifiers_in_class(draft: Draft) -> None:
    """Pictures of the class must not teach new tokens what the subject is not."""
    values = draft.values
    if not values["train_text_encoder_ti"]:
        return
    if draft.wrong & {"photo_class", "class_prompt", "concepts", "token_abstraction"}:
        return
    problems: dict[str, Problem] = {}
    for place, subject in enumerate(subjects_of(values)):
        prompt = subject.class_prompt if subject.with_prior_preservation else None
        found = words(values["token_abstraction"]).search(prompt or "")
        if found is None:
            continue
        taken = inherits(concepts_of(values)[place], "class_prompt", values)
        own = {} if taken else fields_of_concept(values["concepts"], place)
        field = own.get("class_prompt", "class_prompt")
        message = f"the class prompt {shown(prompt)} names the identifier `{found[0]}`, whose new "
        message += "tokens would learn from pictures of the class; allowed: words without it"
        hint = f"set `{field}` to the words for the class alone, or name the subject otherwise"
        problems[field] = Problem(field, message, hint)
    draft.problems.extend(problems.values())


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
        and not words(names or [str(subject.token)]).search(str(subject.instance_prompt))
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
    if not words(names[:1]).search(prompt):
        draft.settle("instance_prompt", renamed(prompt, old, names[0]), reason)
