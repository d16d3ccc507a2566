"""Commands in texts for a shell, for cmd and for PowerShell: their words, and what parts them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Shell = Literal["sh", "cmd", "ps1"]
# By the endings of files; whatever else is a shell's.
_SHELLS: Mapping[str, Shell] = {".bat": "cmd", ".cmd": "cmd", ".ps1": "ps1"}
# What takes the meaning away from the character after it, and joins lines at the end of one.
_ESCAPES: Mapping[Shell, str] = {"sh": "\\", "cmd": "^", "ps1": "`"}
_QUOTES: Mapping[Shell, str] = {"sh": "\"'", "cmd": '"', "ps1": "\"'"}
_OPERATORS: Mapping[Shell, str] = {"sh": ";&|()", "cmd": "&|", "ps1": ";&|()"}
# What a backslash takes the meaning of inside double quotes.
_ESCAPED_IN_QUOTES = '$`"\\\n'
_COMMENT: Mapping[Shell, str] = {
    "sh": r"[ \t]*#",
    "cmd": r"(?i:[ \t]*@?[ \t]*(?:rem\b|::|echo\b))",
    "ps1": r"[ \t]*#",
}
# A line, be it a comment, with what goes on from it.
_LINES: Mapping[Shell, re.Pattern[str]] = {
    shell: re.compile(
        rf"(?P<comment>{_COMMENT[shell]})?(?:[^\n]*{re.escape(escape)}[ \t]*\r?\n)*[^\n]*"
    )
    for shell, escape in _ESCAPES.items()
}
_HEREDOC = re.compile(r"(?<!<)<<-?[ \t]*\\?([\"']?)(\w+)\1")
_REDIRECTION = re.compile(r"&?[<>]+(?:\|?&(?:\d+|-)|[|&])?")
_LINE_END = re.compile(r"[ \t]*\r?\n")
# A dollar that begins no variable, as in single quotes.
PLAIN_DOLLAR = "\ue000"


class Operator(str):
    """What stands between commands, as no word in quotation marks does."""

    __slots__ = ()


@dataclass(frozen=True)
class Line:
    """A line with what goes on from it.

    Args:
        number: of its first line in the text.
        text: as it is written.
        words: with the operators between commands; None where a quotation in it does not end.
    """

    number: int
    text: str
    words: list[str] | None


def shell_of(ending: str) -> Shell:
    """The shell that runs files with this ending."""
    return _SHELLS.get(ending.lower(), "sh")


def lines_of(text: str, shell: Shell, relevant: re.Pattern[str]) -> Iterator[Line]:
    """The lines that hold something relevant, without comments and texts for other programs."""
    place = 0
    while place < len(text):
        found = _LINES[shell].match(text, place)
        assert found is not None
        start, place = place, found.end()
        if found["comment"] is None and relevant.search(found[0]):
            begin = start + len(found[0]) - len(found[0].lstrip(" \t!"))
            reader = _Reader(text, begin, shell)
            words = reader.line()
            # Where a quotation does not end, the next line is a new beginning.
            place = reader.place if words is not None else text.find("\n", start) % (len(text) + 1)
            yield Line(text.count("\n", 0, start) + 1, text[start:place], words)
        if shell == "sh" and found["comment"] is None:
            place = _after_heredoc(text, start, place)
        place += 1


def _after_heredoc(text: str, start: int, end: int) -> int:
    """Where a line ends, with the text that it gives a program to read."""
    found = _HEREDOC.search(text, start, end)
    if found is None:
        return end
    closing = re.compile(rf"^\t*{found[2]}[ \t]*\r?$", re.MULTILINE).search(text, end)
    return end if closing is None else closing.end()


class _Reader:
    """Reads the words of one line from a text.

    Args:
        place: where the line begins.
    """

    def __init__(self, text: str, place: int, shell: Shell) -> None:
        self.text, self.place, self._shell = text, place, shell
        self._words: list[str] = []
        # None: between words; one may be empty, in quotation marks.
        self._word: str | None = None
        self._drops_next = False

    def line(self) -> list[str] | None:
        """The words up to the end of the line; None where a quotation does not end."""
        while self.place < len(self.text) and self.text[self.place] != "\n":
            if not self._step(self.text[self.place]):
                return None
        self._end_word()
        return self._words

    def _step(self, character: str) -> bool:
        """Reads on from one character; whether quotations end."""
        if character == _ESCAPES[self._shell]:
            self._escape()
        elif character in _QUOTES[self._shell]:
            return self._quotation(character)
        elif character in " \t\r":
            self._end_word()
            self.place += 1
        elif character == "#" and self._word is None and self._shell != "cmd":
            end = self.text.find("\n", self.place)
            self.place = len(self.text) if end < 0 else end
        elif not (self._operator() or self._substitution()):
            self._add(character)
            self.place += 1
        return True

    def _escape(self) -> None:
        """A character as it stands, or a line that goes on in the next."""
        joint = _LINE_END.match(self.text, self.place + 1)
        if joint is None:
            # At the end of the text it stands for nothing.
            after = self.text[self.place + 1 : self.place + 2]
            if after:
                self._add(_plain(after))
            self.place += 2
            return
        # A blank after the sign stands between words.
        if joint[0].strip("\r\n"):
            self._end_word()
        self.place = joint.end()

    def _quotation(self, mark: str) -> bool:
        self._add("")
        self.place += 1
        while self.place < len(self.text):
            character = self.text[self.place]
            # PowerShell writes a quotation mark inside a quotation twice.
            is_doubled = self._shell == "ps1" and self.text.startswith(mark * 2, self.place)
            if character == mark and not is_doubled:
                self.place += 1
                return True
            self.place += is_doubled
            if character == "\n" and self._shell == "cmd":
                return False
            if mark == "'":
                self._add(_plain(character))
            elif self._shell != "cmd" and character == _ESCAPES[self._shell]:
                self._escape_in_quotes()
                continue
            elif self._substitution():
                continue
            else:
                self._add(character)
            self.place += 1
        return False

    def _escape_in_quotes(self) -> None:
        after = self.text[self.place + 1 : self.place + 2]
        if after not in _ESCAPED_IN_QUOTES and self._shell == "sh":
            self._add("\\")
            self.place += 1
        else:
            self._add("" if after == "\n" else _plain(after))
            self.place += 2

    def _operator(self) -> bool:
        """Reads what stands between commands, and says whether it does."""
        redirection = _REDIRECTION.match(self.text, self.place)
        if redirection is not None:
            if self._word is not None and self._word.isdigit():
                self._word = None
            self._end_word()
            self._drops_next = redirection[0][-1] in "<>|"
            self.place = redirection.end()
            return True
        character = self.text[self.place]
        begins_block = self._shell == "cmd" and character in "()" and self._word is None
        if character not in _OPERATORS[self._shell] and not begins_block:
            return False
        self._end_word()
        self._words.append(Operator(character))
        self.place += 1
        return True

    def _substitution(self) -> bool:
        """Reads `$(…)`, `${…}` and a command between backticks as they are written."""
        start = self.text[self.place : self.place + 2]
        if self._shell == "cmd" or (start not in ("$(", "${") and start[0] != "`"):
            return False
        pattern = r"`[^`\n]*`" if start[0] == "`" else r"\$\{[^}\n]*\}"
        end = re.compile(pattern).match(self.text, self.place)
        place = self._closing() if start == "$(" else end and end.end()
        if place is None:
            return False
        self._add(self.text[self.place : place])
        self.place = place
        return True

    def _closing(self) -> int | None:
        """The place after the bracket that closes the next one in this line."""
        depth = 0
        for place in range(self.place + 1, len(self.text)):
            character = self.text[place]
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return place + 1
            if character == "\n":
                break
        return None

    def _add(self, text: str) -> None:
        self._word = (self._word or "") + text

    def _end_word(self) -> None:
        if self._word is None:
            return
        if not self._drops_next:
            self._words.append(self._word)
        self._word, self._drops_next = None, False


def _plain(text: str) -> str:
    return text.replace("$", PLAIN_DOLLAR)
