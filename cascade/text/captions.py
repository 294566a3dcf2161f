"""What DeepFloyd IF does to a caption before T5 reads it.

Its training captions came from web pages and were cleaned by rules; prompts go through the same
rules, mistakes included, or T5 sees words in a form that the model never met. "lower" is all that
happens where the reference implementation is told not to clean.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import re
import urllib.parse
import warnings
from typing import Literal

Captions = Literal["verbatim", "lower", "clean"]
"""What is done to a text: nothing (verbatim), lower case without spaces around (lower), or `clean`
twice (clean)."""


def prepared(text: str, captions: Captions) -> str:
    """Prepare a text for the tokenizer; "clean" without its packages is "lower" and a warning.

    The reference does that too; the packages are those of the extra [captions].
    """
    if captions == "verbatim":
        return text
    if captions == "lower" or not _can_clean():
        return text.lower().strip()
    return clean(clean(text))


def clean(text: str) -> str:
    """Apply IF's rules once: no addresses, markup, CJK or identifiers, few kinds of punctuation.

    It needs ftfy and bs4. The order of the rules matters, and some undo each other's purpose; they
    are here to be the same, not to be good.
    """
    bs4, ftfy = (importlib.import_module(name) for name in NEEDED)
    text = urllib.parse.unquote_plus(str(text)).strip().lower()
    text = _apply(_ADDRESSES, text)
    with warnings.catch_warnings():
        # It suspects that whatever looks like a file name is one; it is to parse it anyway.
        warnings.simplefilter("ignore")
        text = bs4.BeautifulSoup(text, features="html.parser").text
    text = _apply(_CHARACTERS, text)
    if len(re.findall("[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_WORDS, text).strip()


NEEDED = ("bs4", "ftfy")
"""The packages that `clean` imports."""

Rules = tuple[tuple[str, str], ...]
"""(regular expression, what replaces each match), in order."""

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_PICTURE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"

_ADDRESSES: Rules = (
    ("<person>", "person"),  # a mark that stands for a name in some captions
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)

_CHARACTERS: Rules = (
    (r"@\w+\b", ""),
    # From CJK strokes to unified ideographs; kana and Hangul stay.
    ("[\u31c0-\u9fff]+", ""),
    (
        "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030"
        "\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_PICTURE}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (
        r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+",
        " ",
    ),
    (r"\s+\.\s+", " "),
)

_WORDS: Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_PICTURE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    # 10x15 in Latin, in Cyrillic, and with the sign of multiplication
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


@functools.cache
def _can_clean() -> bool:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        warnings.warn(
            "captions are only lower-cased: to clean them as DeepFloyd IF does takes "
            f"{' and '.join(missing)}; pip install 'cascade-diffusion[captions]'",
            stacklevel=2,
        )
    return not missing
