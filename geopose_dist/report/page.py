"""One HTML file that needs nothing else: no network, no scripts, light and dark, readable on a phone.

A page is a list of HTML fragments; the functions here make the fragments and escape what is text. Pictures
are data URIs, curves are SVG in the page itself, the style sheet `page.css` is copied in.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from geopose_dist import __version__, files
from geopose_dist.errors import UserError

MAX_BYTES = 8_000_000
"""A page above this is refused: it should open on a phone and fit into a mail."""


def text(words: object) -> str:
    """`words` with what HTML would read as markup escaped."""
    return html.escape(str(words))


def paragraph(words: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{text(words)}</p>"


def note(words: str) -> str:
    """A paragraph in the small print."""
    return f'<p class="note">{text(words)}</p>'


def heading(words: str, level: int = 2) -> str:
    """A heading; level 1 is the page's own."""
    return f"<h{level}>{text(words)}</h{level}>"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, total: Sequence[object] = ()) -> str:
    """A table that scrolls sideways where the screen is narrow; `total` is its last row, in bold."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in headings)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    last = f'<tr class="total">{_cells(total)}</tr>' if total else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}{last}</tbody></table></div>'
    )


def _cells(row: Sequence[object]) -> str:
    return "".join(f"<td>{text(cell)}</td>" for cell in row)


def picture(uri: str, caption: str, alt: str = "") -> str:
    """An image given as data URI, with its caption."""
    return (
        f'<figure><img src="{uri}" alt="{text(alt or caption)}" loading="lazy">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def drawing(svg: str) -> str:
    """A figure whose SVG stands in the page itself and names its own axes."""
    return f"<figure>{svg}</figure>"


def grid(parts: Iterable[str], kind: str) -> str:
    """Figures side by side, as many as fit; `kind` is `figures` (wide) or `panels` (small)."""
    return f'<div class="{kind}">{"".join(parts)}</div>'


def folded(summary: str, content: str) -> str:
    """Content that opens at a click: preformatted text."""
    return f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>"


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    css = resources.files("geopose_dist.report").joinpath("page.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{css}</style></head>\n<body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<footer>geopose-dist {__version__}</footer>\n</body></html>\n"
    )


def write(out: Path, title: str, parts: Iterable[str]) -> None:
    """Write the page to `out`, whole or not at all (UserError if it grew too large)."""
    data = document(title, parts).encode()
    if len(data) > MAX_BYTES:
        raise UserError(
            f"{out}: the page has {len(data)} bytes, at most {MAX_BYTES} are wanted; show fewer tiles"
        )
    files.write_bytes(out, data)
