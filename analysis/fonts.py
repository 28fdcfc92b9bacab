"""Fonts for texts in any script: of the installed fonts those that have a text's characters, by their own charmaps."""

import functools
import re
import unicodedata
from collections.abc import Iterable

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from onceover.base.progress import say

DEFAULT = "DejaVu Sans"  # comes with Matplotlib: Latin, Greek, Cyrillic, Armenian, Georgian, and Arabic's letters
MISSING_GLYPH = "Glyph .* missing from"  # Matplotlib's warning of a box, which a note of ours stands for
_NO_TEXT = re.compile("last ?resort|adobe blank|cm[a-z]+10$|stix(size|nonuni)", re.IGNORECASE)  # boxes and formulas
_UNSHAPED = (3, 11)  # Matplotlib before this version draws letters one by one, from left to right
_REST = re.compile(
    r" (UNIFIED |COMPATIBILITY )?(SMALL |CAPITAL |FINAL |INITIAL |INDEPENDENT |DEPENDENT )?"
    r"(LETTER|SYLLABLE|IDEOGRAPH|VOWEL|CONSONANT|SIGN|DIGIT|CHARACTER|RADICAL|LIGATURE|NUMBER|MARK|TONE)\b.*"
)


def use_fonts(figure: Figure) -> None:
    """Gives the texts of a figure fonts that have their characters; a note names the scripts that no font has.

    Texts that Matplotlib's own font can draw stay as they are. Where it does not shape text, a note says so.
    """
    for axes in figure.axes:
        axes.get_xticklabels()  # sets the labels' texts, which drawing would set else
        axes.get_yticklabels()
    texts = figure.findobj(Text)
    for text in texts:
        missing = _missing(text.get_text())
        if missing:
            text.set_fontfamily([DEFAULT, *families_for(missing)])
    whole = "".join(text.get_text() for text in texts)
    note = font_note(whole)
    if note:
        say(note)
    if matplotlib.__version_info__ < _UNSHAPED and needs_shaping(whole):
        say(
            "this Matplotlib draws letters one by one, from left to right, so texts from right to left and joined or "
            f"stacked letters look wrong in .png and .pdf; the .svg is right, as is Matplotlib {_UNSHAPED[0]}."
            f"{_UNSHAPED[1]}"
        )


def font_note(text: str) -> str | None:
    """A note that names the scripts of a text that no installed font has; None where all can be drawn."""
    missing = _missing(text)
    lacking = missing - frozenset().union(*(_covered(family, missing) for family in families_for(missing)))
    if not lacking:
        return None
    return (
        f"no installed font has the characters of {', '.join(scripts_of(lacking))}, which are drawn as boxes; install "
        "one that has them, such as Google's Noto fonts (Debian and Ubuntu: fonts-noto, fonts-noto-cjk), and draw again"
    )


def scripts_of(characters: Iterable[str]) -> list[str]:
    """The names of the scripts that characters belong to, sorted: ``Devanagari``, ``Hangul``, ``emoji and symbols``."""
    names = set()
    for character in characters:
        name = unicodedata.name(character, "")
        if not name:
            names.add("private or unassigned characters")
        elif unicodedata.category(character).startswith("S"):
            names.add("emoji and symbols")
        else:
            script = _REST.sub("", name)
            names.add(script if script == "CJK" else script.title())
    return sorted(names)


def needs_shaping(text: str) -> bool:
    """Whether a text runs from right to left, or has marks that join or stack with letters."""
    for character in set(text):
        if unicodedata.bidirectional(character) in ("R", "AL") or unicodedata.category(character) == "Mc":
            return True
    return False


def families_for(characters: frozenset[str]) -> tuple[str, ...]:
    """The names of installed fonts that together have as many of the characters as any, the most useful one first."""
    if not characters:
        return ()
    return _families_for(characters)


@functools.lru_cache(maxsize=256)
def _families_for(characters: frozenset[str]) -> tuple[str, ...]:
    region = _region(characters)
    covered = {}
    for family in _files():
        own = _covered(family, characters)
        if own:
            covered[family] = own
    left = characters
    chosen: list[str] = []
    while left:
        ranked = sorted(
            covered, key=lambda name: (-len(covered[name] & left), not name.endswith(region), "Sans" not in name, name)
        )
        if not ranked or not covered[ranked[0]] & left:
            break
        chosen.append(ranked[0])
        left -= covered[ranked[0]]
    return tuple(chosen)


def _region(characters: frozenset[str]) -> str:
    """The ending of the names of fonts that draw Chinese characters as the language of a text does."""
    names = " ".join(unicodedata.name(character, "") for character in characters)
    if "HANGUL" in names:
        return " KR"
    return " JP" if "HIRAGANA" in names or "KATAKANA" in names else " SC"


def _missing(text: str) -> frozenset[str]:
    """The characters of a text that the default font lacks, without those that are not seen."""
    characters = frozenset(text)
    if max(text, default="") < "\u0250":  # Latin letters, which it has
        return frozenset()
    seen = frozenset(character for character in characters if not _is_unseen(character))
    return seen - _covered(DEFAULT, seen)


def _is_unseen(character: str) -> bool:
    """Whether a character is a blank, a control, a joiner or a variation selector."""
    category = unicodedata.category(character)
    return (category[0] in "CZ" and category not in ("Co", "Cn")) or 0xFE00 <= ord(character) <= 0xFE0F


@functools.lru_cache(maxsize=1)
def _files() -> dict[str, str]:
    """The upright file of each font by its name, sorted, of all that are installed, those installed lately included."""
    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            try:
                manager.addfont(path)
            except Exception:  # FreeType's errors for a font that is damaged or of another kind are of many kinds
                continue
    files: dict[str, str] = {}
    for entry in sorted(manager.ttflist, key=lambda entry: (entry.name, *_distance(entry), str(entry.fname))):
        if not _NO_TEXT.match(entry.name):
            files.setdefault(entry.name, str(entry.fname))
    return files


def _distance(entry: font_manager.FontEntry) -> tuple[bool, int]:
    """How far a file is from a font's upright one of regular weight."""
    weight = entry.weight if isinstance(entry.weight, int) else font_manager.weight_dict.get(entry.weight, 400)
    return entry.style != "normal", abs(weight - 400)


def _covered(family: str, characters: frozenset[str]) -> frozenset[str]:
    """Those of the characters that a font has; none where Matplotlib cannot draw it, as it cannot fonts of bitmaps."""
    try:
        font = font_manager.get_font(_files()[family])
    except Exception:  # as in _files
        return frozenset()
    if not font.scalable:
        return frozenset()
    return frozenset(character for character in characters if font.get_char_index(ord(character)))
