"""YAML of any shape, read without harm: a value, or one sentence that says where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kava_core.artefacts import read_regular
from kava_core.errors import KavaError
from kava_core.wording import LONGEST_MESSAGE, shorten, shown

LARGEST = 1 << 20  # bytes
DEEPEST = 40
# Values once every alias stands for what it names: aliases of aliases grow without end.
MOST_VALUES = 100_000
MERGE = "tag:yaml.org,2002:merge"
MOST_BITS = 4096  # of an integer; Python itself refuses to write down much longer ones


def read_yaml(path: Path) -> Any:
    """What the YAML in `path` says.

    KavaError for a file that is missing, no file, too large, not YAML, nested too deep, or too
    large with its aliases resolved, and for a value that is none of its own type (`!!int abc`, a
    date with a month of 13), by its key path. The message has less than 500 characters and the
    path.
    """
    content = read_regular(path, LARGEST)
    try:
        loader = _Loader(content.decode())
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(path, root)
        for place, node in _scalars(root, ()):
            _check_scalar(path, loader, place, node)
        return loader.construct_document(root)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise KavaError(f"{path} is not valid YAML: {shorten(said, LONGEST_MESSAGE)}") from None


class _Loader(yaml.SafeLoader):
    """Stops at the first node that is too deep: the time that a deep document takes is a square."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"expected lists and mappings in at most {DEEPEST} others, found more",
                problem_mark=self.peek_event().start_mark,
            )
        self.depth += 1
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _check_size(path: Path, root: Node) -> None:
    """KavaError if the document is, aliases resolved, too large or without end."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in above:
            raise KavaError(f"{path}{_at(node)}: an alias stands inside of what it names.")
        if id(node) not in sizes:
            above.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            above.discard(id(node))
        if sizes[id(node)] > MOST_VALUES:
            raise KavaError(
                f"{path}{_at(node)}: expected at most {MOST_VALUES:,} values, found more once "
                "every alias is what it stands for. Use fewer aliases."
            )
        return sizes[id(node)]

    size(root)


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _scalars(node: Node, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ScalarNode]]:
    """Every scalar with its key path."""
    if isinstance(node, ScalarNode):
        yield place, node
    elif isinstance(node, SequenceNode):
        for i, child in enumerate(node.value):
            yield from _scalars(child, (*place, str(i)))
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            yield from _scalars(key, place)
            name = key.value if isinstance(key, ScalarNode) else "?"
            yield from _scalars(value, (*place, shorten(name)))


def _check_scalar(
    path: Path, loader: yaml.SafeLoader, place: tuple[str, ...], node: ScalarNode
) -> None:
    """KavaError if the scalar is none of the type that its tag or its form says."""
    if node.tag == MERGE:
        return
    try:
        value = loader.construct_object(node)
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ValueError  # as decimal numbers of that length do
    except yaml.YAMLError:
        raise
    except Exception:  # whatever int(), float(), a table of truth values or a date makes of it
        kind = shorten(node.tag.rpartition(":")[2])
        where = shorten(".".join(place), 150) or "top level"
        raise KavaError(
            f"{path}: {where}: expected {kind}, found {shown(node.value)}. Correct it, or put it "
            "in quotes."
        ) from None


def _at(node: Node) -> str:
    return f", line {node.start_mark.line + 1}"
