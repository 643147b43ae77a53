"""Clean captions the way Open-Sora's text encoder saw them at inference.

The cleaner comes from web-scraped captions: it drops links, nicknames, file names, article numbers
and shop phrases, and keeps plain words. A prompt is cleaned twice (`clean_prompt`). It is lossy by
design, also where that surprises: Chinese characters go, "1920x1080" goes, a link keeps its
"?x=1". The same prompt must give the same tokens, so the oddities stay; `plain_caption` is the
alternative that leaves a prompt alone.

Source: behaviour recorded in `tests/golden/text_cleaning.json`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from urllib.parse import unquote_plus

from opensora.text_repair import repair, strip_tags

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"

#: One rule: its name, then a function, or a pattern and what replaces it.
Rule = tuple[str, Callable[[str], str]]


def _sub(pattern: str, replacement: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)


def _split_joined_words(text: str) -> str:
    """Turn every - and _ into a space if there are more than three of them."""
    return re.sub(r"[-_]", " ", text) if text.count("-") + text.count("_") > 3 else text


#: In this order. Every rule sees what the ones before it left.
RULES: tuple[Rule, ...] = (
    # Markup.
    ("percent codes and plus signs", lambda text: unquote_plus(text).strip().lower()),
    ("the tag <person>", _sub(r"<person>", "person")),
    ("link schemes", _sub(r"\b(?:https?|www):(?:/{1,3}|[a-z0-9%])", "")),
    (
        "names of sites, with their path",
        _sub(rf"\b[a-z0-9.\-]+\.(?:{_DOMAINS})[\w/\-]*\b/?(?!@)", ""),
    ),
    ("html tags", strip_tags),
    ("nicknames", _sub(r"@\w+", "")),
    # Characters.
    ("CJK ideographs and enclosed forms", _sub("[\u31c0-\u9fff]+", "")),
    (
        "dashes of all kinds",
        _sub(
            "[\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030"
            "\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]",
            "-",
        ),
    ),
    ("double quotes of all kinds", _sub("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"')),
    ("single quotes of all kinds", _sub("[\u2018\u2019]", "'")),
    ("entities that were escaped twice", _sub(r"&quot;?|&amp", "")),
    # Numbers and names that say nothing.
    ("IP addresses", _sub(r"\d{1,3}(?:\.\d{1,3}){3}", " ")),
    ("an article number at the end", _sub(r"\d:\d\d\s+$", "")),
    ("line breaks written as \\n", _sub(r"\\n", " ")),
    ("short tags: #1 to #999", _sub(r"#\d{1,3}\b", "")),
    ("long tags: #12345 and up", _sub(r"#\d{5,}\b", "")),
    ("numbers of six digits and up", _sub(r"\b\d{6,}\b", "")),
    ("file names", _sub(rf"(?<!\S)\S+\.(?:{_FILE_TYPES})", "")),
    # Punctuation.
    ("runs of quotes", _sub(r"[\"']{2,}", '"')),
    ("runs of dots", _sub(r"\.{2,}", " ")),
    ("signs and brackets", _sub("[#®•©™&@·º½¾¿¡§~()\\[\\]{}|\\\\/*]+", " ")),
    ("a dot of its own", _sub(r"\s+\.\s+", " ")),
    ("words joined by - or _", _split_joined_words),
    ("wrong encodings and odd letters", repair),
    ("entities, escaped up to twice", lambda text: html.unescape(html.unescape(text))),
    # Identifiers and shop phrases.
    ("ids such as jc6640", _sub(r"\b[a-zA-Z]{1,3}\d{3,15}\b", "")),
    ("ids such as jc6640vc", _sub(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "")),
    ("ids such as 6640vc231", _sub(r"\b\d+[a-zA-Z]+\d+\b", "")),
    ("free shipping", _sub(r"(?:worldwide\s+)?(?:free\s+)?shipping", "")),
    ("free download", _sub(r"(?:free\s)?download(?:\sfree)?", "")),
    ("click on ...", _sub(r"\bclick\s(?:for|on)\s\w+", "")),
    ("file types", _sub(rf"\b(?:{_FILE_TYPES})(?:\simages?)?", "")),
    ("page numbers", _sub(r"\bpage\s+\d+\b", "")),
    ("ids such as j2d1a2a", _sub(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ")),
    ("dimensions such as 4x4", _sub(r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", "")),
    # Spacing and ends. The text is not stripped before the ends are trimmed, as upstream.
    ("space before a colon", _sub(r"\b\s+:\s+", ": ")),
    ("space after , . /", _sub(r"(\D[,./])\b", r"\1 ")),
    ("runs of white space", _sub(r"\s+", " ")),
    ("quotes around everything", _sub(r"\A[\"'](.+)[\"']\Z", r"\1")),
    ("a sign at the start", _sub(r"\A['_,\-:;]", "")),
    ("a sign at the end", _sub(r"['_,\-:+]\Z", "")),
    ("a single word with a leading dot", _sub(r"\A\.\S+\Z", "")),
    ("outer white space", str.strip),
)


def clean_caption(text: str) -> str:
    """Apply every rule once, in order."""
    for _, rule in RULES:
        text = rule(text)
    return text


def clean_prompt(text: str) -> str:
    """Clean twice, as Open-Sora cleans a prompt before encoding it."""
    return clean_caption(clean_caption(text))


def plain_caption(text: str) -> str:
    """Lower and strip, all that Open-Sora does when cleaning is off."""
    return text.lower().strip()
