"""Fonts for letters that matplotlib's own font lacks, for pictures of pixels: in a page or an SVG text stays text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mefem_cli import console

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def letters_may_lack() -> Iterator[None]:
    """Draw without a warning for each letter that the font has not, such as a Chinese one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def lend(figure: Figure) -> list[str]:
    """Give texts with letters that matplotlib's own font lacks, such as Chinese ones, an installed font that has them.

    Returns the texts with letters that no installed font has.
    """
    from matplotlib.font_manager import findfont
    from matplotlib.text import Text

    ticks = [label for axis in figure.axes for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    texts = [text for text in (*figure.findobj(Text), *ticks) if not text.get_text().isascii()]
    letters = {letter for text in texts for letter in text.get_text() if letter != "\n"}
    lacking = letters - _letters_of(findfont("DejaVu Sans"), letters)
    if not lacking:
        return []
    families, lacking = _installed_fonts(lacking)
    for text in texts:
        text.set_fontfamily(["DejaVu Sans", *families])
    lost = dict.fromkeys(text.get_text() for text in texts if lacking & set(text.get_text()))
    return [one.replace(r"\$", "$").replace("\n", "") for one in lost]


def warn(texts: Sequence[str]) -> None:
    """Warn of texts in pictures that no installed font has all letters of; of none, say nothing."""
    if texts:
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        console.warn(
            f'no installed font has all letters of "{texts[0][:60]}"{more}: in PNGs a box stands for each that lacks; '
            "install one such as Noto Sans CJK, or take the HTML page or the SVG, for which the browser finds a font"
        )


def _installed_fonts(letters: set[str]) -> tuple[list[str], set[str]]:
    """Return families of installed fonts that have `letters`, each at least one of its own, and what is left of them.

    The files are looked up anew: matplotlib's own list was made when it ran first.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager

    families = []
    for path in sorted(findSystemFonts(), key=_fanciness):
        found = _letters_of(path, letters) if letters else set()
        if found:
            fontManager.addfont(path)
            families.append(fontManager.ttflist[-1].name)
            letters = letters - found
    return families, letters


def _fanciness(path: str) -> tuple[int, str]:
    """Return how far a font is from a plain one, by the words in its file's name: a key to sort by."""
    name = Path(path).stem.lower()
    return sum(word in name for word in ("serif", "bold", "italic", "oblique", "mono", "light", "thin", "black")), name


def _letters_of(path: str, letters: set[str]) -> set[str]:
    """Return which letters a font file has; none where it cannot be drawn with, such as one of coloured pictures."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return set()
    return {letter for letter in letters if font.get_char_index(ord(letter))} if font.scalable else set()
