"""One HTML file that needs nothing else: no network, light and dark, readable on a phone.

A page is a list of HTML fragments; the functions here make the fragments and escape what is text. Pictures
are data URIs, curves are SVG in the page itself, the style sheet `page.css` is copied in. The page tells the
browser to fetch nothing and to run only the scripts that are named here, by their hashes: a file or city
called like markup stays words even if somebody forgets to escape it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

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


def slider(left: tuple[str, str], right: tuple[str, str]) -> str:
    """Two images of one size, (data URI, name) each, one over the other; what is dragged is the cut between them.

    Without scripts both stand side by side.
    """
    pictures = "".join(f'<img src="{uri}" alt="{text(name)}" loading="lazy">' for uri, name in (left, right))
    told = f"<span>{text(left[1])}</span><span>{text(right[1])}</span>"
    return (
        f'<figure class="pair"><div class="stack">{pictures}</div>'
        '<input type="range" min="0" max="100" value="50" hidden aria-label="how much of the left picture is seen">'
        f"<figcaption>{told}</figcaption></figure>"
    )


def grid(parts: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="figures">{"".join(parts)}</div>'


def panels(small: Sequence[str], large: str) -> str:
    """Small figures beside a large one; below it where the screen is narrow."""
    return f'<div class="panels of{len(small)}"><div class="small">{"".join(small)}</div>{large}</div>'


def folded(summary: str, content: str) -> str:
    """Content that opens at a click: preformatted text."""
    return f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>"


def data(name: str, facts: Any) -> str:
    """Facts for a script, as JSON that no parser of HTML mistakes for anything else; found by the id `name`."""
    words = json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{text(name)}">{words}</script>'


def resource(name: str) -> str:
    """A file beside this module."""
    return resources.files("geopose_dist.report").joinpath(name).read_text(encoding="utf-8")


def document(title: str, parts: Iterable[str], scripts: Iterable[str] = ()) -> str:
    """The whole page; `scripts` are names of files beside this module that run at its end."""
    body = "\n".join(parts)
    names = [*(["page.js"] if 'class="pair"' in body else []), *scripts]
    sources = [resource(name).strip() for name in names]
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    rules = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{resource('page.css')}</style></head>\n<body>\n"
        f"<h1>{text(title)}</h1>\n{body}\n<footer>geopose-dist {__version__}</footer>\n"
        + "".join(f"<script>{source}</script>\n" for source in sources)
        + "</body></html>\n"
    )


def write(out: Path, title: str, parts: Iterable[str], scripts: Iterable[str] = ()) -> None:
    """Write the page to `out`, whole or not at all (UserError if it grew too large)."""
    page = document(title, parts, scripts).encode()
    if len(page) > MAX_BYTES:
        raise UserError(
            f"{out}: the page has {len(page)} bytes, at most {MAX_BYTES} are wanted; show fewer tiles"
        )
    files.write_bytes(out, page)
