"""A definition as text: data, and the line of every value.

YAML is read by narrow rules, so that a value means what it looks like: a plain scalar is `null`, `true`, `false` or a
number exactly as JSON writes them (`~` and nothing at all are null too); everything else is text. So `no`, `on` and
`2013-01-01` are text, and so is `007`. Anchors, aliases, tags, repeated keys and keys that are not text are refused.
JSON is read strictly.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.errors import DefinitionError, Problem

Format = Literal["yaml", "json"]
Place = tuple[str | int, ...]

_FORMATS: dict[str, Format] = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)|[-+]?Infinity|NaN")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_SPACE = re.compile(r"[ \t\r\n]*")
#: characters that neither UTF-8 nor Postgres can hold
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_MAX_DIGITS = 400  # a longer one is no number that anything here can hold


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a definition and the input of an execution may be."""

    #: tasks in a definition
    tasks: int = 100_000
    #: levels of lists and mappings, the document's own among them
    depth: int = 32
    #: bytes of a definition as text
    document_bytes: int = 32 * 1024 * 1024
    #: bytes of one task's params, and of an execution's input, as JSON
    params_bytes: int = 262_144


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Document:
    """What a text says, with the lines that it says it on."""

    #: mappings, lists, text, numbers, true, false, null
    data: Any
    #: the file, or `<dict>`
    source: str
    #: 1-based line of every value that came from text, by its path
    lines: Mapping[Place, int] = field(default_factory=dict, repr=False)

    def line(self, path: Place) -> int | None:
        """Line of the value at `path`, or of the nearest one around it that is known."""
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)


def read_document(path: Path | str, limits: Limits = DEFAULT_LIMITS) -> Document:
    """Read a definition from a .yaml, .yml or .json file.

    Raises:
        DefinitionError: the file cannot be read, or `parse_document` refuses it.
    """
    path = Path(path)
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise _error(str(path), None, "not a definition by its name", "name it *.yaml, *.yml or *.json")
    try:
        with path.open("rb") as file:
            text = file.read(limits.document_bytes + 1)
    except OSError as exc:
        raise _error(str(path), None, f"cannot be read: {exc.strerror or exc}") from exc
    return parse_document(text, str(path), form, limits)


def of_data(data: Mapping[str, Any], source: str = "<dict>") -> Document:
    """A document of data that did not come from text."""
    return Document(data=data, source=source)


def parse_document(
    text: str | bytes,
    source: str,
    format: Format,  # noqa: A002 - it is the format
    limits: Limits = DEFAULT_LIMITS,
) -> Document:
    """Parse a definition.

    Raises:
        DefinitionError: above the limits, not UTF-8, or not the format; each problem has its line.
    """
    if len(text) > limits.document_bytes:
        raise _error(source, None, f"larger than {limits.document_bytes} bytes", "split the workflow")
    try:
        clean = text.decode() if isinstance(text, bytes) else text
        if len(clean.encode()) > limits.document_bytes:
            raise _error(source, None, f"larger than {limits.document_bytes} bytes", "split the workflow")
    except UnicodeError as exc:
        before = exc.object[: exc.start] if isinstance(exc, UnicodeDecodeError | UnicodeEncodeError) else ""
        line = len((before + b"." if isinstance(before, bytes) else before + ".").splitlines())
        raise _error(source, line, "not UTF-8 text", "save the file as UTF-8") from None
    clean = clean.removeprefix("\ufeff")
    if (nul := clean.find("\0")) >= 0:
        raise _error(source, clean.count("\n", 0, nul) + 1, "a NUL character", "take it out")
    builder = _Builder(source, limits.depth)
    _yaml(clean, builder) if format == "yaml" else _Json(clean, builder).parse()
    if builder.problems:
        raise DefinitionError(tuple(builder.problems))
    return Document(data=builder.root, source=source, lines=builder.lines)


def _error(source: str, line: int | None, what: str, how: str = "") -> DefinitionError:
    return DefinitionError((Problem(path="", what=what, how=how, source=source, line=line),))


class _Builder:
    """Takes what a parser meets, value by value, and builds the data and the lines without recursion."""

    def __init__(self, source: str, depth: int) -> None:
        self.source, self.depth = source, depth
        self.root: Any = None
        self.lines: dict[Place, int] = {}
        self.problems: list[Problem] = []
        #: open containers: the container, its path, and for a mapping the key that waits for its value
        self.stack: list[tuple[dict[str, Any] | list[Any], Place]] = []
        self.keys: list[str | None] = []

    def complain(self, line: int, what: str, how: str) -> None:
        self.problems.append(Problem(path="", what=what, how=how, source=self.source, line=line))

    def key(self, text: str, line: int) -> None:
        self.characters(text, line)
        container, path = self.stack[-1]
        here = (*path, text)
        if text in container:
            self.complain(
                line, f"key {text[:80]!r} stands twice in one mapping", f"line {self.lines.get(here)} has it first"
            )
        self.lines[here] = line
        self.keys[-1] = text

    @property
    def wants_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1][0], dict) and self.keys[-1] is None

    def characters(self, text: str, line: int) -> None:
        """What an escape can smuggle in: neither can be stored in Postgres."""
        if UNSTORABLE.search(text):
            self.complain(line, "a NUL character or half a surrogate pair", "take it out")

    def value(self, value: Any, line: int) -> Place:
        if isinstance(value, str):
            self.characters(value, line)
        if not self.stack:
            self.root = value
            self.lines[()] = line
            return ()
        container, path = self.stack[-1]
        if isinstance(container, list):
            here: Place = (*path, len(container))
            self.lines[here] = line
            container.append(value)
            return here
        key = self.keys[-1]
        assert key is not None
        container[key] = value
        self.keys[-1] = None
        return (*path, key)

    def open(self, container: dict[str, Any] | list[Any], line: int) -> None:
        if len(self.stack) >= self.depth:
            raise _error(self.source, line, f"nested deeper than {self.depth} levels", "flatten it")
        self.stack.append((container, self.value(container, line)))
        self.keys.append(None)

    def close(self) -> None:
        self.stack.pop()
        self.keys.pop()

    def number(self, text: str, line: int) -> int | float | None:
        found = _NUMBER.fullmatch(text)
        if found is not None and len(text) <= _MAX_DIGITS:
            value = float(text) if found[1] or found[2] else int(text)
            if abs(value) != float("inf"):
                return value
        self.complain(line, f"{text[:40]} is no number that JSON has", "quote it if it is text")
        return None


def _yaml(text: str, builder: _Builder) -> None:
    skip = documents = 0  # skip counts the open levels of a key that is no text
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            mark = event.start_mark
            assert mark is not None
            line = mark.line + 1
            opens = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
            closes = isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent)
            if skip:
                skip += opens - closes
            elif opens and builder.wants_key:
                builder.complain(line, "a key that is a list or a mapping", 'quote a template: "{{ ... }}"')
                builder.key(f"{{line {line}, column {mark.column}}}", line)
                skip = 1
            elif opens or isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
                _yaml_node(event, line, builder)
            elif closes:
                builder.close()
            elif isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _error(builder.source, line, "a second document (---)", "one file holds one workflow")
    except yaml.MarkedYAMLError as exc:
        wrong = exc.problem_mark or exc.context_mark
        at = wrong.line if wrong else 0
        what = ", ".join(part for part in (exc.context, exc.problem) if part)
        how = "indent with spaces, not tabs" if "\t" in "".join(text.split("\n")[at : at + 1]) else ""
        raise _error(builder.source, at + 1, f"not YAML: {what}", how) from None
    except yaml.reader.ReaderError as exc:
        control = re.search(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", text)
        at = text.count("\n", 0, control.start()) + 1 if control else 1
        raise _error(builder.source, at, f"not YAML: {exc.reason}", "take it out, or escape it in quotes") from None


def _yaml_node(event: Any, line: int, builder: _Builder) -> None:
    is_key, text = builder.wants_key, getattr(event, "value", "")
    if isinstance(event, yaml.AliasEvent):
        builder.complain(line, f"an alias (*{event.anchor})", "write the value out: aliases are refused")
        text, value = f"*{event.anchor}", None
    else:
        if event.anchor is not None:
            builder.complain(line, f"an anchor (&{event.anchor})", "take it out: anchors are refused")
        if event.tag is not None:
            builder.complain(line, f"a tag ({event.tag[:80]})", "take it out; quote what is text")
        if isinstance(event, yaml.MappingStartEvent):
            builder.open({}, line)
            return
        if isinstance(event, yaml.SequenceStartEvent):
            builder.open([], line)
            return
        value = text if event.style else _plain(text, line, builder)
        if is_key and not isinstance(value, str):
            builder.complain(line, f"key {text or 'null'} is not text", "quote it")
    if is_key:
        builder.key(text, line)
    else:
        builder.value(value, line)


def _plain(text: str, line: int, builder: _Builder) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _NUMBER.fullmatch(text):
        return builder.number(text, line)
    if _NOT_FINITE.fullmatch(text):
        builder.complain(line, f"{text} is no number that JSON has", "quote it if it is text")
    return text


class _Json:
    """JSON by the letter of RFC 8259, without recursion."""

    def __init__(self, text: str, builder: _Builder) -> None:
        self.text, self.builder = text, builder
        self.breaks = [match.start() for match in re.finditer("\n", text)]
        self.at = 0

    @property
    def line(self) -> int:
        return bisect_right(self.breaks, self.at - 1) + 1 if self.at else 1

    def fail(self, what: str, how: str = "") -> DefinitionError:
        return _error(self.builder.source, self.line, f"not JSON: {what}", how)

    def space(self) -> str:
        """Pass over white space; the character after it, or nothing at the end."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing too
        return self.text[self.at : self.at + 1]

    def string(self) -> str:
        try:
            text, self.at = scanstring(self.text, self.at + 1, True)
        except json.JSONDecodeError as exc:
            self.at = exc.pos
            raise self.fail(exc.msg) from None
        assert isinstance(text, str)
        return text

    def parse(self) -> None:
        builder = self.builder
        while True:
            opened = self.value()
            while not opened or self.space() in ("]", "}"):
                if not builder.stack:
                    if self.space():
                        raise self.fail("text after the end of the value")
                    return
                character, is_list = self.space(), isinstance(builder.stack[-1][0], list)
                if character == ("]" if is_list else "}"):
                    self.at += 1
                    builder.close()
                    opened = False
                elif character == "," and not opened:
                    self.at += 1
                    break
                else:
                    raise self.fail(f"expected , or {']' if is_list else '}'}, found {character or 'the end'!r}")
            if builder.wants_key:
                self.key()

    def key(self) -> None:
        if self.space() != '"':
            raise self.fail("a key must be text in double quotes", "there is no comma after the last value")
        line = self.line
        self.builder.key(self.string(), line)
        if self.space() != ":":
            raise self.fail("expected : after a key")
        self.at += 1

    def value(self) -> bool:
        """Read a value, or the opening of a container: true for the latter."""
        character, line, builder = self.space(), self.line, self.builder
        if character in ("{", "["):
            self.at += 1
            builder.open({} if character == "{" else [], line)
            return True
        if character == '"':
            builder.value(self.string(), line)
            return False
        for word in ("true", "false", "null"):
            if self.text.startswith(word, self.at):
                self.at += len(word)
                builder.value(_WORDS[word], line)
                return False
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            excess = _NOT_FINITE.match(self.text, self.at)
            raise self.fail(f"expected a value, found {excess[0] if excess else character or 'the end'!r}")
        self.at = found.end()
        builder.value(builder.number(found[0], line), line)
        return False
