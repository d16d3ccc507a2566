"""What a captioner is asked to write, and the caption made of its answer.

Works on text alone: which model answers, and what becomes of the caption, is not known here. The
rule of the modes: a caption leaves out what the new word must learn, and tells the rest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Mode = Literal["plain", "character", "product", "style", "general"]

# What the subject is called when a captioner is asked, whatever its trigger: so an answer serves
# any trigger, and none is too odd for a model to repeat.
_NAME = "TOK"
# CLIP reads 77 tokens; English has about 1.3 of them to a word.
_MOST_WORDS = 60
# A word or a group of words this many times on end is a model that has lost its way; a single
# word is said thrice on purpose.
_LOOP, _WORD_LOOP = 3, 5
_LONGEST_GROUP = 8
# In a text of so many words, fewer different ones than this share are a loop as well.
_LONG, _LEAST_VARIETY = 20, 0.35

_FORM = (
    "Answer with the caption alone: one sentence of at most 40 words in plain English. Do not "
    "begin with words such as 'The image shows'. Do not guess names, ages or feelings, and say "
    "nothing that cannot be seen."
)
_WHOLE_PICTURE = (
    "Write a caption of this picture. Tell what is shown and what it looks like, what it does, "
    "what is around it, the kind of shot and the light."
)
_WHOLE_PICTURE_MODES = ("plain", "general")
_INSTRUCTIONS: Mapping[Mode, str] = {
    "plain": _WHOLE_PICTURE,
    "general": _WHOLE_PICTURE,
    "character": (
        f"Write a caption of this picture in which the main person is called {_NAME} and nothing "
        f"else. Everybody knows what {_NAME} looks like: never mention the face, hair, eyes, skin, "
        f"body, age or sex of {_NAME}. Do tell the kind of shot and its angle, the pose, the "
        f"expression, the clothing, who else is there, the place and the light. Begin with {_NAME}."
    ),
    "product": (
        f"Write a caption of this picture in which the main object is called {_NAME} and nothing "
        f"else. Everybody knows what {_NAME} looks like: never mention its shape, colour, "
        "material, print, lettering or brand, nor what kind of thing it is. Do tell where it is "
        "and how it lies or is held, who wears or uses it, what it stands on, what is around it, "
        f"the kind of shot and the light. Begin with {_NAME}."
    ),
    "style": (
        "Write a caption of this picture that tells only what is shown: who or what it is, what "
        "it does, where, and what is around it. Never mention how it is made: no medium, "
        "technique, brushwork, lines, palette, mood, artist or style, and no words such as "
        "painting, drawing, illustration, photo or artwork."
    ),
}
# What a mode's subject is called where there is no word for it.
_SUBJECTS: Mapping[Mode, str] = {
    "plain": "the subject",
    "general": "the subject",
    "character": "the person",
    "product": "the object",
    "style": "the subject",
}

# What is cut out of an answer, in this order, and what stands there instead.
_DIRT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE), ""),
    # What was thought aloud before an end that has no beginning.
    (re.compile(r"\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE), ""),
    # Not every word in angle brackets is a mark: identifiers may stand in them too.
    (
        re.compile(r"</?(?:s|pad|unk|bos|eos|image|caption|answer|p|b|i|br)>|<\|[^|>]*\|>", re.I),
        " ",
    ),
    (re.compile(r"^\s*```\w*\s*$", re.MULTILINE), ""),
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"^\s*(?:#{1,6}|>|[-*•+]|\d{1,2}[.)])\s+", re.MULTILINE), ""),
    (re.compile(r"(\*\*\*|\*\*|\*|___|__|`)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!\w)"), r"\1"),
    (re.compile(r"\A\s*(?:assistant|answer)\s*:\s*", re.IGNORECASE), ""),
)
# The lines with which chat models greet and take leave.
_GREETING = re.compile(
    r"\A\s*(?:(?:sure|certainly|of course|absolutely|okay|ok)(?: thing)?[.:!,]\s*)?"
    r"(?:(?:here(?:'s| is| are)|this is|below is|the following is)\b[^\n.:]{0,80}:\s*)?"
    r"(?:(?:image |picture |photo |short |detailed |suggested )?(?:caption|description)s?"
    r"(?: \d+)?\s*:\s*)?",
    re.IGNORECASE,
)
_FAREWELL = re.compile(
    r"(?:^|(?<=[.!?])\s)\s*\(?(?:note\b\s*:|let me know|i hope (?:this|that)|feel free|"
    r"would you like|if you (?:need|would|'d)|please let me|is there anything|word count).*\Z",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
_REFUSAL = re.compile(
    r"\A\W*(?:i(?:'m| am) (?:very |so )?sorry|sorry(?:,|\W+(?:but|i)\b|\W*\Z)|i apologi[sz]e|"
    r"unfortunately,? (?:i|we|you|it|there|no|the (?:image|picture|photo))\b|"
    r"i (?:can ?not|can't|won't|will not|do not feel|don't feel|don't see|do not see|"
    r"am unable|am not able|am not comfortable|must decline)|"
    r"i'm (?:unable|not able|not comfortable)|unable to\b|as an? (?:ai|language|artificial)|"
    r"no (?:image|picture|photo) (?:(?:was|is|has been) )?"
    r"(?:provided|attached|given|included|uploaded|shared)|"
    r"please (?:provide|upload|share|attach))|"
    r"\bas an ai (?:language )?model\b",
    re.IGNORECASE,
)
_PICTURE = r"(?:image|picture|photo|photograph|scene|painting|illustration|drawing|artwork)"
# `The image shows`, `In this picture we see`, `This is a photo of`.
_OPENING = re.compile(
    rf"\A(?:(?:the|this) (?:\w+ )?{_PICTURE} "
    r"(?:shows|depicts|features|captures|displays|presents|portrays|contains|is of|showcases|"
    r"illustrates)(?: us)? |"
    rf"in (?:the|this) {_PICTURE},? (?:we (?:can )?see |you (?:can )?see |there (?:is|are) )?|"
    rf"this is (?=an? (?:[\w-]+ ){{0,3}}{_PICTURE} (?:of|showing) )|"
    r"(?:there (?:is|are)|we (?:can )?see) )",
    re.IGNORECASE,
)
# `A loose watercolour painting of`, which the word of a style must learn. Any word might stand
# before the medium; of others than these, it may be the subject that holds a picture.
_MEDIUM_WORDS = (
    *("abstract", "acrylic", "aerial", "anime", "antique", "artistic", "beautiful", "black"),
    *("black-and-white", "blurry", "bold", "bright", "cartoon", "chalk", "charcoal", "classical"),
    *("close-up", "closeup", "colorful", "colored", "colour", "color", "coloured", "colourful"),
    *("comic", "concept", "conceptual", "crayon", "dark", "delicate", "detailed", "digital"),
    *("dramatic", "dreamy", "expressive", "faded", "fantasy", "fine", "flat", "full-body"),
    *("geometric", "gouache", "grainy", "graphic", "hand-drawn", "hand-painted", "high-angle"),
    *("highly", "hyperrealistic", "impressionist", "impressionistic", "ink", "intricate"),
    *("isometric", "japanese", "large", "line", "long", "loose", "low-angle", "low-poly", "macro"),
    *("manga", "medium", "minimal", "minimalist", "minimalistic", "modern", "monochrome"),
    *("monochromatic", "moody", "oil", "old", "ornate", "pastel", "pen", "pencil"),
    *("photorealistic", "pixel", "playful", "pop", "professional", "psychedelic", "quick"),
    *("realistic", "retro", "rough", "sepia", "sepia-toned", "simple", "simplified", "sketchy"),
    *("small", "soft", "still", "studio", "stylised", "stylized", "surreal", "surrealist"),
    *("traditional", "vector", "very", "vibrant", "vintage", "vivid", "watercolor"),
    *("watercolour", "whimsical", "white", "wide", "wide-angle", "2d", "3d", "and", "art"),
)
_MEDIUM = re.compile(
    rf"\A(?:an? |the )?(?:(?:{'|'.join(_MEDIUM_WORDS)}),? )*"
    r"(?:painting|drawing|illustration|photo|photograph|image|picture|sketch|artwork|rendering|"
    r"render|print|watercolou?r|cartoon|comic|engraving|collage|shot) "
    r"(?:of|showing|depicting|featuring) ",
    re.IGNORECASE,
)
# Who or what stands in for the trigger where the model did not write it.
_STAND_INS: Mapping[str, re.Pattern[str]] = {
    "character": re.compile(
        r"\A(?:an? |the |this |one )?(?:(?:young|old|older|middle-aged|smiling|single|main) )*"
        r"(?:man|woman|person|boy|girl|baby|child|toddler|lady|guy|gentleman|individual|"
        r"subject|figure|character|someone|somebody)\b",
        re.IGNORECASE,
    ),
    "product": re.compile(
        r"\A(?:an? |the |this |one )?(?:main )?(?:product|object|item|thing|article)\b",
        re.IGNORECASE,
    ),
}
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|jr|sr|no|vs|e\.g|i\.e|etc|u\.s)|\b[A-Z])\.\Z", re.I
)
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|\Z)")
# First words that are written small behind a prefix; anything else may be a name.
_SMALL = frozenset(
    (
        *("a", "an", "the", "this", "that", "these", "those", "there", "it", "he", "she", "they"),
        *("one", "two", "three", "four", "several", "some", "many", "close", "young", "old"),
        *("in", "on", "at", "with", "under", "over", "behind", "before", "beside", "inside"),
        *("outside", "near", "from", "through", "while", "people", "person", "man", "woman"),
        *("someone", "photo", "photograph", "portrait", "sitting", "standing", "wearing"),
        *("holding", "lying", "looking", "smiling", "walking", "hanging"),
    )
)


def instruction(mode: Mode) -> str:
    """What to ask a captioner that follows instructions.

    Args:
        mode: `caption_mode`.
    """
    return f"{_INSTRUCTIONS[mode]} {_FORM}"


def finished(raw: str, *, mode: Mode, trigger: str, class_word: str | None = None) -> str | None:
    """The caption in a captioner's answer, with the trigger in its place; None if it holds none.

    Args:
        raw: the answer, word for word.
        mode: `caption_mode` that was asked for.
        trigger: the word that is to learn; empty where there is none.
        class_word: what the subject is, such as `woman`; stands behind the trigger in `character`.
    """
    text = _cleaned(raw)
    if _REFUSAL.search(text):
        return None
    text = _without_opening(text, mode)
    text = _shortened(_sound(_sentences(text)))
    if not re.search(r"\w", text):
        return None
    if mode in _STAND_INS:
        text = _pattern(_NAME).sub(lambda _: trigger or _SUBJECTS[mode], text)
    if not trigger:
        return _capitalised(text)
    text = _with_trigger_once(text, mode, trigger, class_word)
    return _PLACED[mode](text, trigger, class_word)


def _cleaned(raw: str) -> str:
    """The answer on one line, without markup, greetings, leave-taking and quotes around it."""
    text = unicodedata.normalize("NFC", raw).replace("’", "'")
    for pattern, instead in _DIRT:
        text = pattern.sub(instead, text)
    text = _GREETING.sub("", text, count=1)
    text = _FAREWELL.sub("", text)
    text = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    text = " ".join(text.split())
    text = re.sub(r" +(?=[,;:!?](?:\s|\Z)|\.(?:\s|\Z)|'s\b)", "", text)
    return _unquoted(text)


def _unquoted(text: str) -> str:
    """Without quotation marks around the whole, or one that was never closed."""
    for opening, closing in ('""', "''", "“”", "«»"):
        inner = text.removeprefix(opening).removesuffix(closing)
        around = text.startswith(opening) and text.rstrip(".").endswith(closing)
        if around and opening not in inner.rstrip("." + closing):
            return inner.rstrip("." + closing).strip()
        if text.startswith(opening) and not set(text[1:]) & {opening, closing}:
            return text[1:].strip()
    return text


def _without_opening(text: str, mode: Mode) -> str:
    """Without words about there being a picture, and for a style without its medium."""
    text = _OPENING.sub("", text, count=1)
    return _MEDIUM.sub("", text, count=1) if mode == "style" else text


def _sentences(text: str) -> list[str]:
    """The whole sentences; an unfinished one only where there is no other."""
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.end()].strip()
        if _ABBREVIATION.search(sentence) and end.end() < len(text):
            continue
        sentences.append(sentence)
        start = end.end()
    rest = text[start:].strip()
    return sentences or ([rest] if rest else [])


def _sound(sentences: Sequence[str]) -> list[str]:
    """The sentences up to the first that goes round in circles or comes again."""
    sound: list[str] = []
    for sentence in sentences:
        if sentence in sound or _is_loop([*sound, sentence]):
            break
        sound.append(sentence)
    return sound


def _is_loop(sentences: Sequence[str]) -> bool:
    words = re.findall(r"\w+(?:'\w+)?", " ".join(sentences).lower())
    for length in range(1, _LONGEST_GROUP + 1):
        times = _WORD_LOOP if length == 1 else _LOOP
        for start in range(len(words) - length * times + 1):
            group = words[start : start + length]
            if words[start : start + length * times] == group * times:
                return True
    return len(words) >= _LONG and len(set(words)) < _LEAST_VARIETY * len(words)


def _shortened(sentences: Sequence[str]) -> str:
    """As many sentences as fit, without the last period; of one too long, what fits of it."""
    kept: list[str] = []
    for sentence in sentences:
        if len(" ".join([*kept, sentence]).split()) > _MOST_WORDS:
            break
        kept.append(sentence)
    if not kept and sentences:
        words = " ".join(sentences[0].split()[:_MOST_WORDS])
        before, comma, _ = words.rpartition(",")
        kept = [before if comma and len(before.split()) > _MOST_WORDS // 2 else words]
    return " ".join(kept).rstrip(" .,;:")


def _pattern(trigger: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)


def _with_trigger_once(text: str, mode: Mode, trigger: str, class_word: str | None) -> str:
    """The trigger as it is written, where the model wrote it first; later it is the subject.

    In captions of the whole picture it may be an ordinary word, which then stays one.
    """
    if mode in _WHOLE_PICTURE_MODES:
        return _pattern(trigger).sub(lambda _: trigger, text, count=1)
    again = f"the {class_word.lower()}" if mode == "character" and class_word else _SUBJECTS[mode]
    found = 0

    def written(place: re.Match[str]) -> str:
        nonlocal found
        found += 1
        if found == 1:
            return trigger
        return _capitalised(again) if _begins_a_sentence(text, place.start()) else again

    return _pattern(trigger).sub(written, text)


def _begins_a_sentence(text: str, place: int) -> bool:
    before = text[:place].rstrip()
    return before.endswith((".", "!", "?")) and not _ABBREVIATION.search(before)


def _has(text: str, trigger: str) -> bool:
    return _pattern(trigger).search(text) is not None


def _starts(text: str, trigger: str) -> bool:
    return _pattern(trigger).match(text) is not None


def _lowered(text: str) -> str:
    """Begun small, unless the first word may be a name."""
    word = re.split(r"\W", text, maxsplit=1)[0]
    return text[:1].lower() + text[1:] if word.lower() in _SMALL else text


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(text: str, trigger: str, _: str | None) -> str:
    """`TOK a cup on a table`, as fal's captions are."""
    return text if _has(text, trigger) else f"{trigger} {_lowered(text)}"


def _general(text: str, trigger: str, _: str | None) -> str:
    """`TOK, a cup on a table`."""
    return text if _has(text, trigger) else f"{trigger}, {_lowered(text)}"


def _style(text: str, trigger: str, _: str | None) -> str:
    """`A cup on a table, in the style of TOK`."""
    if not _has(text, trigger):
        return f"{_capitalised(text)}, in the style of {trigger}"
    return _capitalised(text)


def _character(text: str, trigger: str, class_word: str | None) -> str:
    """`a photo of TOK woman sitting on a chair`."""
    name = f"{trigger} {class_word.lower()}" if class_word else trigger
    text = _standing_in("character", text, trigger)
    if not _has(text, trigger):
        return f"a photo of {name}, {_lowered(text)}"
    if class_word and not _has(text, name):
        text = _pattern(trigger).sub(lambda _: name, text, count=1)
    return f"a photo of {text}" if _starts(text, trigger) else _lowered(text)


def _product(text: str, trigger: str, _: str | None) -> str:
    """`a photo of TOK on a wooden table`."""
    text = _standing_in("product", text, trigger)
    if not _has(text, trigger):
        return f"a photo of {trigger}, {_lowered(text)}"
    return f"a photo of {text}" if _starts(text, trigger) else _lowered(text)


def _standing_in(mode: str, text: str, trigger: str) -> str:
    """With the trigger for the words that a model begins with instead."""
    if _has(text, trigger):
        return text
    return _STAND_INS[mode].sub(lambda _: trigger, text, count=1)


_PLACED: Mapping[Mode, Callable[[str, str, str | None], str]] = {
    "plain": _plain,
    "general": _general,
    "character": _character,
    "product": _product,
    "style": _style,
}
