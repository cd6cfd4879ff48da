"""Pieces of a page: escaped text, tables, figures with their numbers, and the frame around them."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from urllib.parse import quote

import pandas as pd

from fedsim.text import csv_text

_LONG = 40
"""Characters from which on a cell's text may break anywhere, in a column wide enough to read."""


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, the number it is sorted by (None: its text), and small print under it."""

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its contents."""

    name: str
    title: str
    body: str


MARK = '<meta name="generator" content="fedsim">'
"""In the head of every page, by which it is known as ours."""


def escaped(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{escaped(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    """A list of plain texts; nothing for none."""
    return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>" if items else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Cell | str]], caption: str, kind: str = "sortable") -> str:
    """A table that the script makes sortable; a column whose first cell has a number is flush right.

    A table wider than its place scrolls under its first column, with a shadow at the edge that hides the rest.
    """
    whole = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    numbers = [cell.value is not None for cell in whole[0]] if whole else [False] * len(header)
    head = "".join(
        f'<th scope="col"{_class("number" if number else "")}>{escaped(name)}</th>'
        for name, number in zip(header, numbers, strict=True)
    )
    body = []
    for cells in whole:
        body.append(
            f'<tr><th scope="row">{_breakable(cells[0].text)}</th>'
            + "".join(_cell(cell) for cell in cells[1:])
            + "</tr>"
        )
    return (
        # The caption stands outside: it wraps where the table scrolls.
        f'<p class="caption">{escaped(caption)}</p>'
        f'<div class="scroll" tabindex="0"><table{_class(kind)} aria-label="{escaped(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


def figure(svg: str, title: str, caption: str, csv_name: str, frame: pd.DataFrame, kind: str = "") -> str:
    """A drawn figure with its title, its caption and its numbers to save."""
    named = svg.replace('role="img"', f'role="img" aria-label="{escaped(title)}"', 1)
    return (
        f'<figure{_class(kind)}><h3>{escaped(title)}</h3><div class="scroll" tabindex="0">{named}</div>'
        f"<figcaption>{escaped(caption)} {csv_link(csv_name, frame)}</figcaption></figure>"
    )


def side_by_side(*figures: str) -> str:
    """Figures in one row, where the window has room for two; those that were not drawn leave no gap."""
    return f'<div class="row">{"".join(figures)}</div>'


def csv_link(name: str, frame: pd.DataFrame) -> str:
    """A link that holds the whole table as CSV (numbers to six digits), and needs no server."""
    text = csv_text(frame, float_format="%.6g")
    data = quote(text, safe=" ,.:;-_/()=+")
    return f'<a download="{escaped(name)}.csv" href="data:text/csv;charset=utf-8,{data}">CSV</a>'


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page. Its content policy forbids every request: what is not in the file is not shown."""
    style, script = _asset("page.css"), _asset("page.js")
    contents = "".join(f'<li><a href="#{one.name}">{escaped(one.title)}</a></li>' for one in sections)
    body = "".join(f'<section id="{one.name}"><h2>{escaped(one.title)}</h2>{one.body}</section>' for one in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{MARK}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escaped(title)}</title><style>{style}</style></head>"
        f"<body><header><h1>{escaped(title)}</h1>{lead}</header>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav><main>{body}</main>'
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("fedsim.report") / name).read_text(encoding="utf-8")


def _cell(cell: Cell) -> str:
    shown = escaped(cell.text) + (f" <small>{escaped(cell.note)}</small>" if cell.note else "")
    if cell.value is None:
        return f"<td{_class('long' if len(cell.text) > _LONG else '')}>{shown}</td>"
    return f'<td class="number" data-value="{cell.value:.9g}">{shown}</td>'


def _breakable(text: str) -> str:
    """Settings may break behind their dots, underscores and signs of equality; short names stay whole."""
    if " (" not in text:
        return escaped(text)
    name, _, settings = text.partition(" (")
    return f"{escaped(name)} (" + re.sub("([._=])", r"\1<wbr>", escaped(settings))


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
