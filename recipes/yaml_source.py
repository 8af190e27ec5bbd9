"""Reads YAML so that every key and value has a line and a column.

Flow: bytes → checked text → PyYAML's node graph (composed, never constructed) → plain data, and a span for each path in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from memrewrite.errors import RecipeError
from memrewrite.recipes.validation_errors import Loc
from memrewrite.recipes.yaml_scalars import AMBIGUOUS, RESOLVERS, scalar
from memrewrite.recipes.yaml_scalars import TAG as _TAG

MAX_BYTES = 2**18  # the largest recipe of the gallery has 2**10
MAX_NODES = 10_000  # as written, and with aliases expanded: a few lines of aliases can expand to billions of nodes
MAX_DEPTH = 20  # a recipe needs 6
_MERGE = _TAG + "merge"
_WIDTH = 100  # of an excerpt, in characters
MOST_QUOTED = 300  # characters of a message that quotes the text
_BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # line ends as PyYAML counts them


@dataclass(frozen=True, order=True)
class Span:
    """A part of one line; line and column count from 1, the width is in characters."""

    line: int
    column: int
    width: int = 1


@dataclass(frozen=True)
class Source:
    """A text and its name, for locations in error messages."""

    name: str
    text: str

    def at(self, span: Span) -> str:
        """`file:line:column`."""
        return f"{self.name}:{span.line}:{span.column}"

    def excerpt(self, span: Span) -> str:
        """The line, cropped to a readable width, with carets under the span."""
        lines = _BREAKS.split(self.text)
        line = lines[span.line - 1] if span.line <= len(lines) else ""
        start = max(0, span.column - 1 - _WIDTH // 2) if len(line) > _WIDTH else 0
        margin, column = f"{span.line:>5} | ", span.column - 1 - start
        shown = re.sub(r"[^\S ]|[\x00-\x1f\x7f]", " ", line[start : start + _WIDTH])  # a tab would shift the caret
        carets = "^" * max(1, min(span.width, len(shown) - column))
        return f"{margin}{shown}\n{' ' * (len(margin) - 2)}| {' ' * column}{carets}"

    def fail(self, span: Span, what: str, hint: str) -> NoReturn:
        """Raise `RecipeError` for a problem at `span`."""
        what = what if len(what) <= MOST_QUOTED else what[: MOST_QUOTED - 3] + "..."
        raise RecipeError(what, where=f"{self.at(span)}\n{self.excerpt(span)}", hint=hint) from None


@dataclass(frozen=True)
class Document:
    """A recipe's data and, for each path in it, the spans of its key and its value."""

    source: Source
    data: dict[str, Any]
    keys: dict[Loc, Span]
    values: dict[Loc, Span]

    def span(self, loc: Loc, *, at_key: bool = False) -> Span:
        """The span of `loc`; if it is not in the file, of the nearest enclosing key or value that is."""
        if at_key and loc in self.keys:
            return self.keys[loc]
        if loc in self.values:
            return self.values[loc]
        while loc and loc not in self.values:
            loc = loc[:-1]
        return self.keys.get(loc) or self.values[loc]


def decode(name: str, raw: bytes) -> Source:
    """The bytes of a file as text. Raises `RecipeError` if they are too many or not UTF-8."""
    _refuse_large(name, len(raw))
    try:
        return Source(name, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        hint = "save the file as UTF-8 text"
        raise RecipeError("the file is not UTF-8 text", where=f"{name}:{line}:{column}", hint=hint) from None


def _refuse_large(name: str, size: int) -> None:
    if size > MAX_BYTES:
        hint = f"a recipe has at most {MAX_BYTES} bytes"
        raise RecipeError("the file is too large for a recipe", where=name, hint=hint)


def read_document(source: Source) -> Document:
    """Read YAML, plain data only: mappings with text keys, lists, text, numbers, booleans and null. Raises `RecipeError`."""
    _refuse_large(source.name, len(source.text))
    start = Span(1, 1)
    try:
        loader = _Composer(source)
        root = loader.get_single_node()
        if root is None:
            source.fail(start, "the recipe is empty", "begin with `memrewrite: 1`")
        if not isinstance(root, MappingNode):
            source.fail(_span(root), "a recipe must be a mapping (`key: value`)", "begin with `memrewrite: 1`")
        reader = _NodeReader(source)
        data = reader.read(root, ())
    except yaml.YAMLError as error:
        _fail_yaml(source, error)
    return Document(source, data, reader.keys, reader.values)


class _Composer(yaml.SafeLoader):
    """Composes the nodes of a text. It raises `RecipeError` at the first node beyond `MAX_NODES` or `MAX_DEPTH`."""

    yaml_implicit_resolvers = RESOLVERS

    def __init__(self, source: Source) -> None:
        super().__init__(source.text)
        self.source, self.left, self.depth = source, MAX_NODES, 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """The next node of the text."""
        self.left -= 1
        self.depth += 1
        if self.left < 0:
            self.source.fail(self._next(), "the recipe is too large", f"at most {MAX_NODES} values")
        if self.depth > MAX_DEPTH:
            self.source.fail(self._next(), "the recipe is nested too deeply", "a recipe needs no more than six levels")
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _next(self) -> Span:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return Span(mark.line + 1, mark.column + 1)


class _NodeReader:
    """Converts nodes to data and records the span of each key and value."""

    def __init__(self, source: Source) -> None:
        self.source, self.left = source, MAX_NODES
        self.keys: dict[Loc, Span] = {}
        self.values: dict[Loc, Span] = {}
        self.around: list[Node] = []  # the nodes being read: an alias to one of them would recurse without end

    def read(self, node: Node, loc: Loc) -> Any:
        """The data of `node`, whose path is `loc`."""
        self.left -= 1
        if self.left < 0:
            self.source.fail(_span(node), "the recipe is too large", f"at most {MAX_NODES} values, with aliases expanded")
        if any(node is outer for outer in self.around):
            self.source.fail(_span(node), "this value contains itself through an alias", "write the value out")
        self.values[loc] = _span(node)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        allowed = _TAG + ("map" if isinstance(node, MappingNode) else "seq")
        if node.tag != allowed:
            self._refuse_tag(node)
        self.around.append(node)
        data: Any = None
        if isinstance(node, SequenceNode):
            data = [self.read(item, (*loc, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, MappingNode):
            data = self._mapping(node, loc)
        self.around.pop()
        return data

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        """The data of a mapping. Merged keys (`<<: *defaults`) are read first: keys written here override them."""
        merged: dict[str, Any] = {}
        for other in reversed([other for key, value in node.value if key.tag == _MERGE for other in _merged(value)]):
            if not isinstance(other, MappingNode):
                self.source.fail(_span(other), "`<<` needs a mapping", "name an anchored mapping: `<<: *defaults`")
            merged |= self.read(other, loc)
        self.values[loc] = _span(node)
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            key, span = self._key(key_node), _span(key_node)
            here = (*loc, key)
            if key in data:
                first = self.keys[here].line
                self.source.fail(span, f"key {key!r} appears twice", f"keep one; the first is in line {first}")
            self.keys[here] = span
            data[key] = self.read(value_node, here)
        return merged | data

    def _key(self, node: Node) -> str:
        key = self._scalar(node) if isinstance(node, ScalarNode) else None
        if not isinstance(key, str):
            shown = f"`{node.value}`" if isinstance(node, ScalarNode) else "this"
            self.source.fail(_span(node), f"{shown} cannot be a key: it is not text", "put the key in quotes")
        return key

    def _scalar(self, node: ScalarNode) -> Any:
        if node.tag == AMBIGUOUS:
            what = f"`{node.value}` has more than one meaning: YAML 1.1 and 1.2 read it differently"
            hint = "write a number in decimal digits, without a leading zero, `_` or `:`; write text in quotes"
            self.source.fail(_span(node), what, hint)
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return node.value
        if kind not in ("null", "bool", "int", "float"):
            self._refuse_tag(node)
        try:
            return scalar(node.tag, node.value)
        except ValueError as error:
            shown = node.value if len(node.value) <= 40 else node.value[:37] + "..."
            self.source.fail(_span(node), f"`{shown}` cannot be read as {kind}: {error}", "write a plain value")

    def _refuse_tag(self, node: Node) -> NoReturn:
        tag = node.tag.replace(_TAG, "!!")
        self.source.fail(_span(node), f"tag '{tag}' is not allowed in recipes", "write plain values, without tags")


def _merged(node: Node) -> list[Node]:
    """The values of `<<`: of a list, its items."""
    return list(node.value) if isinstance(node, SequenceNode) else [node]


def _span(node: Node) -> Span:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return Span(start.line + 1, start.column + 1, max(1, width))


def _fail_yaml(source: Source, error: yaml.YAMLError) -> NoReturn:
    """Raise PyYAML's error as a `RecipeError` with its location; the most common mistakes are reworded."""
    if isinstance(error, yaml.reader.ReaderError):
        before = _BREAKS.split(source.text[: error.position])
        span = Span(len(before), len(before[-1]) + 1)
        source.fail(span, "a character that YAML does not allow", "remove it, or write it as an escape in double quotes")
    if not isinstance(error, yaml.MarkedYAMLError) or (mark := error.problem_mark or error.context_mark) is None:
        source.fail(Span(1, 1), f"this is not YAML: {error}", "correct the file")
    span, problem = Span(mark.line + 1, mark.column + 1), error.problem or "it cannot be read"
    if "expected ':'" in problem and error.context_mark:  # PyYAML notices on the next line
        key = Span(error.context_mark.line + 1, error.context_mark.column + 1)
        source.fail(key, "a `:` is missing", "write `key: value`, with a space after the colon")
    if "another document" in problem:
        source.fail(span, "the file contains more than one YAML document", "keep one recipe per file")
    if "'\\t'" in problem:
        source.fail(span, "a tab is used where YAML allows only spaces", "indent with spaces")
    context = f" {error.context}" if error.context else ""
    source.fail(span, f"this is not YAML: {problem}{context}", "check quotes, brackets, colons and indentation")
