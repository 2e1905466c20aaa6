"""One self-contained HTML page that opens offline and reads well in light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --paper: #fbfbfa; --soft: #667; --line: #dcdce2; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ee; --paper: #15171c; --soft: #9aa; --line: #333842; --card: #1d2026; }
  img.figure { background: #fff; border-radius: 6px; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.lead, figcaption, .soft { color: var(--soft); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; } .tiles figure { margin: 0; width: 112px; }
.tiles img { width: 112px; height: 112px; object-fit: cover; border-radius: 6px; display: block; }
.tiles figcaption { font-size: .72rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } ul.points li { margin: .4rem 0; } p, li { overflow-wrap: anywhere; }
.callout { border-left: 4px solid #2a6fdb; background: var(--card); padding: .8rem 1rem; border-radius: 0 6px 6px 0; }
.callout p { margin: .3rem 0 0; } .callout strong { font-size: 1.15rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; 
  font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 0 .3em; }
"""


def page(title: str, lead: str, body: Iterable[str]) -> str:
    """Return a whole page; `title` and `lead` are escaped, `body` is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n' + "\n".join(body) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """Return a section heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table of plain texts."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(path: Path, caption: str) -> str:
    """Return a picture file, embedded, with its caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img class="figure" alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def themed_figure(light: bytes, dark: bytes, caption: str) -> str:
    """Return one PNG figure drawn twice, embedded: for light pages and for dark ones."""
    encoded = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (dark, light)]
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{encoded[0]}">'
        f'<img alt="{escape(caption, quote=True)}" src="{encoded[1]}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def callout(headline: str, text: str) -> str:
    """Return a marked paragraph with a headline."""
    return f'<div class="callout"><strong>{escape(headline)}</strong><p>{escape(text)}</p></div>'


def points(texts: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return '<ul class="points">' + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def code(lines: Iterable[str]) -> str:
    """Return lines of code as they are."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def tiles(pictures: Iterable[tuple[bytes, str] | tuple[bytes, str, str]]) -> str:
    """Return small JPEG pictures with captions, and titles that show under the pointer, in a row that wraps."""
    items = []
    for data, caption, *title in pictures:
        picture = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        hover = f' title="{escape(title[0])}"' if title else ""
        items.append(f"<figure{hover}>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="tiles">{"".join(items)}</div>'


def thumbnail(path: Path, side: int = 224) -> bytes:
    """Return a picture file as a small JPEG without metadata."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
