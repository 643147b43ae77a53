"""Undo what web pages do to text: tags, wrong decoding, look-alike letters, control characters.

Open-Sora cleans captions with two libraries for this (an HTML parser and ftfy). What their output
contributes to a caption is small enough to state here, and a prompt then cleans to the same words
on every machine.
"""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

_HIDDEN_TAGS = ("script", "style", "template")
_BYTES = {chr(byte): byte for byte in range(0x80, 0x100)}
for _byte in range(0x80, 0xA0):
    try:
        _BYTES[bytes([_byte]).decode("cp1252")] = _byte
    except UnicodeDecodeError:
        continue  # cp1252 leaves five bytes undefined; they stay control characters
_CONTINUATION = "".join(char for char, byte in _BYTES.items() if byte < 0xC0)
#: UTF-8 read as cp1252: a lead letter and its continuation bytes. In a dagger (E2 80 A0), the last
#: byte may have become a plain space.
_MOJIBAKE = re.compile(
    rf"[Â-ß][{_CONTINUATION}]"
    rf"|[à-ï][{_CONTINUATION}]{{2}}"
    rf"|â€\x20"
    rf"|[ð-ô][{_CONTINUATION}]{{3}}"
)
_TERMINAL = re.compile("\x1b\\[(?:\\d|;)*[a-zA-Z]")
_FULL_WIDTH = re.compile("[\u3000\uff01-\uff9f\uffa0-\uffdc\uffe0-\uffee]+")
_LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_LETTERS = str.maketrans(
    {
        **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **{char: unicodedata.normalize("NFKC", char) for char in "ĲĳǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"},
        "ﬅ": "\u017ft",
        "ŉ": "'n",
    }
)


class _Text(HTMLParser):
    """Collect the text of a fragment, as a browser would show it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN_TAGS

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN_TAGS and self._hidden > 0

    def unknown_decl(self, data: str) -> None:
        if data.startswith("CDATA["):
            self.handle_data(data.removeprefix("CDATA["))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def strip_tags(text: str) -> str:
    """Return the text of an HTML fragment: tags, comments and scripts go, entities are decoded."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def repair(text: str) -> str:
    """Repair wrongly decoded and oddly encoded text.

    In order: terminal escapes go; UTF-8 that was read as Windows-1252 is decoded; remaining C1
    controls become the characters Windows-1252 has there; ligatures and full-width forms become
    plain letters; curly quotes become straight; line breaks become newlines; control characters
    go; the result is composed (NFC). Other wrong encodings are left as they are.
    """
    text = _TERMINAL.sub("", text)
    text = _MOJIBAKE.sub(lambda match: _decode(match[0]), text)
    text = re.sub(r"[\x80-\x9f]", _as_cp1252, text)
    text = _FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _LINE_BREAK.sub("\n", text.translate(_LETTERS))
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def _decode(sequence: str) -> str:
    """Decode one candidate, or return it unchanged if it is likely to be meant."""
    # Letters alone can be a word ("ßš"); symbols and controls inside one are the sign of damage.
    if all(char in "ŠŒŽšœžŸƒ" for char in sequence[1:]):
        return sequence
    try:
        return bytes(0xA0 if char == " " else _BYTES[char] for char in sequence).decode("utf-8")
    except UnicodeDecodeError:
        return sequence


def _as_cp1252(match: re.Match[str]) -> str:
    """Read one C1 control as a Windows-1252 byte."""
    try:
        return match[0].encode("latin-1").decode("cp1252")
    except UnicodeDecodeError:
        return match[0]
