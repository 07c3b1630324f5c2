"""The report as one self-contained HTML file: its frame, tables and pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.plots import as_svg

_NUMBER = re.compile(r"-?\d[\d.,]*(\s±\s[\d.]+)?%?")
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#222}
h1{font-size:clamp(1.4rem,5vw,2rem);line-height:1.2}
table{border-collapse:separate;border-spacing:0;border:solid #ccc;border-width:1px 0 0 1px;font-size:.85rem}
td,th{border:solid #ccc;border-width:0 1px 1px 0;padding:.25rem .4rem;text-align:left}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:.8rem 0}
td:first-child{white-space:nowrap}.text{white-space:pre-line}
td:first-child,th:first-child{position:sticky;left:0;background:#fff}
figure{margin:1.5rem 0}figure img{width:100%;max-width:36rem;height:auto}figcaption{color:#555;font-size:.9rem}
.verdict{border-left:4px solid #888;padding:.2rem .8rem;margin:1rem 0}.verdict p{margin:.2rem 0}
.reproduced{border-color:#0072b2}.contradicted{border-color:#d55e00}
@media(max-width:40rem){td:first-child{white-space:normal;min-width:5rem}td,th{padding:.2rem}table{font-size:.8rem}}
@media print{body{max-width:none;font-size:10pt}.scroll{overflow:visible}table{font-size:7.5pt}
td:first-child{white-space:normal}figure,table,.verdict{break-inside:avoid}h2,h3{break-after:avoid}}"""


def write_figures(folder: Path, figures: Iterable[tuple[str, str, Any]]) -> dict[str, str]:
    """Write each (name, caption, figure) to `figures/NAME.svg`; return name -> picture for the page."""
    place = folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, caption, figure in figures:
        svg = as_svg(figure)
        (place / f"{name}.svg").write_bytes(svg)
        data = base64.b64encode(svg).decode()
        image = f'<img alt="{escaped(caption)}" src="data:image/svg+xml;base64,{data}">'
        pictures[name] = f"<figure>{image}<figcaption>{escaped(caption)}</figcaption></figure>"
    return pictures


def write_page(folder: Path, page: str) -> Path:
    """Write `report.html`; return its path."""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def framed(title: str, parts: Iterable[str]) -> str:
    """Return the HTML document with these parts as its body."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def paragraphs(texts: Iterable[str]) -> list[str]:
    """Return each text as a paragraph."""
    return [f"<p>{escaped(text)}</p>" for text in texts]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], colours: Sequence[Sequence[str]] = ()) -> str:
    """Return an HTML table that scrolls sideways beside its first column; `colours` are the cells', "" for none."""
    cells = "".join(f"<th>{escaped(name)}</th>" for name in head)
    lines = ""
    for number, row in enumerate(rows):
        shades = colours[number] if colours else [""] * len(row)
        lines += "<tr>" + "".join(map(_cell, row, shades)) + "</tr>"
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def _cell(text: str, colour: str) -> str:
    kind = ' class="n"' if _NUMBER.fullmatch(text) else ""
    style = f' style="background:{colour}"' if colour else ""
    return f"<td{kind}{style}>{escaped(text)}</td>"


def escaped(text: object) -> str:
    """Return a text with HTML's special characters written out."""
    return html.escape(str(text))


def capitalised(text: str) -> str:
    """Return a text with a capital first letter and the others as they are."""
    return text[:1].upper() + text[1:]
