"""The configuration keys as a table, made from the settings themselves. The README holds it; a test keeps it true."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedsim.settings import Config

_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_BEYOND = 1e6
"""Upper bounds from here on only keep nonsense out; the table is shorter without them."""


def settings_markdown() -> str:
    """A Markdown table of every key, what it may be, and its default."""
    return "\n".join(["| key | allowed | default |", "|---|---|---|", *_lines("", Config)])


def _lines(prefix: str, section: type[BaseModel]) -> list[str]:
    """A line for each key of a section, and of those inside it."""
    lines = []
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += _lines(f"{prefix}{key}.", inner)
        else:
            lines.append(_line(f"{prefix}{key}", field))
    return lines


def _line(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"| `{key}` | {_allowed(field.annotation, field.metadata)} | `{shown}` |"


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _allowed(inner, [*metadata, *(meta for item in more for meta in getattr(item, "metadata", [item]))])
    if origin in (Union, types.UnionType):
        return " or ".join(_allowed(part, metadata if part is not type(None) else []) for part in get_args(annotation))
    if origin is Literal:
        return ", ".join(str(value) for value in get_args(annotation))
    if origin is tuple:
        return f"{len(get_args(annotation))} numbers"
    if origin is dict:
        return "what the method's file lists"
    if origin is list:
        (item,) = get_args(annotation)
        return f"list of {_allowed(item, [])}" if get_origin(item) is Literal else "list of names"
    name = {int: "integer", float: "number", str: "text", bool: "true, false", type(None): "null"}[annotation]
    bounds = [
        f"{words} {getattr(item, sign):g}"
        for item in metadata
        for sign, words in _SIGNS.items()
        if hasattr(item, sign) and not (sign == "le" and getattr(item, sign) >= _BEYOND)
    ]
    return " ".join([name, ", ".join(bounds)]).strip()
