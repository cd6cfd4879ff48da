"""YAML as every file of a user's is read: safe, each key once, and no content that ends in a traceback.

Beyond YAML 1.1, ``1e-3`` is a number (that version wants ``1.0e-3``). Keys are plain words and are kept as written.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_DEEPEST = 50
"""Levels of nesting; no file of ours has more than five."""
_LARGEST = 200_000
"""Values in one file once every alias stands for what it names."""
_MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """What is wrong with a text, in words that end a sentence; `line` is where, from 1, if known."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what if line is None else f"{what} (line {line})")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, in C where PyYAML was built with it: ten times faster."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[str, Any]:
    _check_keys(node, {key.value for key, _ in node.value if key.tag == _MERGE})
    loader.flatten_mapping(node)
    _check_keys(node, None)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _check_keys(node: yaml.MappingNode, merges: set[str] | None) -> None:
    """Refuse keys that are lists or mappings, and, before merges are resolved, keys that are given twice."""
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError("a list or mapping as a key is not allowed; keys are plain words", line)
        if merges is None or key.value in merges:
            continue
        if key.value in seen:
            raise YamlError(f"key '{shown(key.value)}' is there twice; each key is allowed once", line)
        seen.add(key.value)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str) -> Any:
    """The value of a YAML text: mappings with string keys, lists, strings, numbers, booleans, None, dates.

    Raises:
        YamlError: not YAML, a key twice or not a word, nested too deeply, or a value that its tag does not allow.
    """
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(str(error.problem or error.context or "not YAML").split())
        raise YamlError(what, None if mark is None else mark.line + 1) from error
    except yaml.YAMLError as error:
        raise YamlError(shown(" ".join(str(error).split()))) from error
    except Exception as error:  # a tag's own reader fails in many ways: a 30th of February, a number of 5,000 digits
        raise YamlError(f"a value cannot be read ({shown(str(error))})") from error


def shown(value: str, longest: int = 100) -> str:
    """A text of a user's for a message: one line, and not all of a long one."""
    line = " ".join(value.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                raise YamlError(
                    f"nested more than {_DEEPEST} deep", event.start_mark.line + 1 if event.start_mark else None
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node with its aliases written out; refuses more than `_LARGEST`, and a node within itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if known[id(node)] < 0:
            raise YamlError("a value holds itself", node.start_mark.line + 1)
        return known[id(node)]
    known[id(node)] = -1
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    count = 1 + sum(_size(part, known) for part in parts)
    if count > _LARGEST:
        raise YamlError(f"more than {_LARGEST:,} values once aliases are written out")
    known[id(node)] = count
    return count
