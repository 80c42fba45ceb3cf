"""Templates: `{{ expression }}` inside the strings of a task's params, at any depth; keys are never templates.

An expression is CEL (Common Expression Language) over `input`, `variables`, `tasks`, `execution`, `item` and
`secrets`. A string that is one expression and nothing else keeps the value's type; elsewhere the value becomes text:
true and false as such, null as nothing, lists and mappings as JSON. Write `{{ '{{' }}` for two literal braces; `}}`
outside an expression is plain text. The result of a task whose id is no identifier is `tasks["load-data"]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import cel

from pipeline.errors import TemplateError

#: names that an expression may start from
ROOTS = ("tasks", "variables", "input", "execution", "item", "secrets")
#: what the engine puts under `execution`
EXECUTION_FIELDS = ("id", "workflow_id", "user_id", "task_id")
#: characters in one expression
MAX_EXPRESSION = 4096
#: bytes that all expressions of one `render` may add up to, as JSON
MAX_OUTPUT = 1_048_576
#: levels of lists and mappings that are looked into
MAX_DEPTH = 64
#: a macro inside a macro multiplies the work, and a macro after a macro the size: both are bounded
MAX_MACROS, MAX_MACRO_NESTING = 4, 2

Path = tuple[str | int, ...]

_MACROS = frozenset({"all", "exists", "exists_one", "existsOne", "map", "filter"})
_FUNCTIONS = frozenset(
    {"size", "contains", "startsWith", "endsWith", "matches", "int", "uint", "double", "string", "bytes", "dyn", "type"}
    | {"timestamp", "duration", "getFullYear", "getMonth", "getDayOfYear", "getDayOfMonth", "getDate", "getDayOfWeek"}
    | {"getHours", "getMinutes", "getSeconds", "getMilliseconds"}
)
_TYPES = frozenset({"bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"})
_WORDS = frozenset({"true", "false", "null", "in"})
_TOKEN = re.compile(
    r"""(?P<string>(?:[bB]?[rR]|[rR][bB])(?:\"{3}(?s:.*?)\"{3}|'{3}(?s:.*?)'{3}|"[^"\n]*"|'[^'\n]*')
      |[bB]?(?:\"{3}(?s:\\.|[^\\])*?\"{3}|'{3}(?s:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
      |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
      |(?P<number>0[xX][0-9a-fA-F]+[uU]?|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?[uU]?)
      |(?P<space>\s+)
      |(?P<mark>//|.)""",
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One value that a template reads."""

    #: one of ROOTS; any other name is unknown, which validation reports
    root: str
    #: the member of the root that is read; None where the root is read as a whole or by a computed name
    name: str | None
    #: where the template stands in the value
    at: Path
    #: source of the expression, without the braces
    expression: str
    #: true where the expression is this path and nothing else: without the value, rendering must fail
    plain: bool

    @property
    def path(self) -> str:
        """The place as text: `options.files[2]`."""
        return path_text(self.at)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A template that cannot be compiled."""

    #: where the template stands in the value
    at: Path
    #: source of the expression, without the braces
    expression: str
    #: what is wrong with it
    cause: str

    def __str__(self) -> str:
        return f"{path_text(self.at)}: template {{{{ {_short(self.expression)} }}}}: {self.cause}".removeprefix(": ")


@dataclass(frozen=True)
class _Expression:
    source: str
    program: cel.Program
    #: (root, name) of every read
    reads: tuple[tuple[str, str | None], ...]
    #: root and members where the expression is one plain path
    path: tuple[str, ...]


class _Wrong(Exception):  # noqa: N818 - it never leaves this module
    """Why one template fails, before its place is known."""


def path_text(path: Path) -> str:
    """A path as people write it: `tasks[3].params.path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def survey(value: Any) -> tuple[tuple[Reference, ...], tuple[Fault, ...]]:
    """Everything that the templates in `value` read, and the templates that cannot be compiled."""
    references: list[Reference] = []
    faults: list[Fault] = []
    for at, text in _templates(value, ()):
        source = text
        try:
            for piece in _pieces(text):
                if isinstance(piece, tuple):
                    (source,) = piece
                    found = _compile(source)
                    references += (
                        Reference(root=root, name=name, at=at, expression=source, plain=bool(found.path))
                        for root, name in found.reads
                    )
        except _Wrong as exc:
            faults.append(Fault(at=at, expression=source.strip(), cause=str(exc)))
    return tuple(references), tuple(faults)


def references(value: Any) -> tuple[Reference, ...]:
    """Every value that the templates in `value` read, in order.

    Raises:
        TemplateError: a template cannot be compiled; the message names its place.
    """
    found, faults = survey(value)
    if faults:
        raise TemplateError(str(faults[0]))
    return found


def task_names(value: Any) -> frozenset[str]:
    """Ids of the tasks whose results the templates in `value` read.

    Raises:
        TemplateError: a template cannot be compiled.
    """
    return frozenset(r.name for r in references(value) if r.root == "tasks" and r.name is not None)


def has_templates(value: Any) -> bool:
    """True where a string in `value` holds a template."""
    return next(_templates(value, ()), None) is not None


def render(value: Any, scope: Mapping[str, Any]) -> Any:
    """`value` with every template replaced by what it gives in `scope`, a mapping of roots to JSON values.

    Raises:
        TemplateError: a template cannot be compiled or evaluated, gives what is not JSON, or the output is above
            MAX_OUTPUT; the message names the place, the expression and the cause.
    """
    return _render(value, scope, (), [MAX_OUTPUT])


def _templates(value: Any, at: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        if "{{" in value:
            yield at, value
    elif len(at) < MAX_DEPTH:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from _templates(item, (*at, key))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from _templates(item, (*at, index))


def _render(value: Any, scope: Mapping[str, Any], at: Path, room: list[int]) -> Any:
    if isinstance(value, str):
        return _render_text(value, scope, at, room) if "{{" in value else value
    if isinstance(value, dict | list | tuple):
        if len(at) >= MAX_DEPTH:
            raise TemplateError(f"{path_text(at[:4])}...: nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            return {key: _render(item, scope, (*at, key), room) for key, item in value.items()}
        return [_render(item, scope, (*at, index), room) for index, item in enumerate(value)]
    return value


def _render_text(text: str, scope: Mapping[str, Any], at: Path, room: list[int]) -> Any:
    source = text
    try:
        pieces = _pieces(text)
        values: list[Any] = []
        for piece in pieces:
            if not isinstance(piece, tuple):
                values.append(piece)
                continue
            (source,) = piece
            value, size = _evaluate(_compile(source), scope)
            room[0] -= size
            if room[0] < 0:
                raise _Wrong(f"the rendered params are above {MAX_OUTPUT} bytes; hand on an artifact instead")
            values.append(value)
        return values[0] if len(values) == 1 else "".join(map(_as_text, values))
    except _Wrong as exc:
        raise TemplateError(str(Fault(at=at, expression=source.strip(), cause=str(exc)))) from None


def _pieces(text: str) -> list[str | tuple[str]]:
    """Plain text, and expressions as 1-tuples."""
    pieces: list[str | tuple[str]] = []
    start = 0
    while (opening := text.find("{{", start)) >= 0:
        if opening > start:
            pieces.append(text[start:opening])
        depth, position = 0, opening + 2
        while True:
            if text.startswith("}}", position) and depth == 0:
                break
            token = _TOKEN.match(text, position)
            if token is None or position - opening > MAX_EXPRESSION + 2:
                if position - opening > MAX_EXPRESSION:
                    raise _Wrong(f"longer than {MAX_EXPRESSION} characters")
                raise _Wrong("{{ is not closed by }}; for two literal braces write {{ '{{' }}")
            depth += (token[0] == "{") - (token[0] == "}")
            position = token.end()
        pieces.append((text[opening + 2 : position],))
        start = position + 2
    if start < len(text):
        pieces.append(text[start:])
    return pieces


@lru_cache(maxsize=4096)
def _compile(source: str) -> _Expression:
    if len(source) > MAX_EXPRESSION:
        raise _Wrong(f"longer than {MAX_EXPRESSION} characters")
    if not source.strip():
        raise _Wrong("empty")
    tokens = [(m.lastgroup or "", m[0]) for m in _TOKEN.finditer(source) if m.lastgroup != "space"]
    if ("mark", "//") in tokens:
        raise _Wrong("comments are not possible in templates")
    try:
        program = cel.compile(source)
        names, functions = program.variables(), program.functions()
    except Exception as exc:
        raise _Wrong(f"syntax: {_syntax(str(exc))}") from None
    # operators are listed as functions too, as `_+_` or `@in`
    if unknown := [name for name in functions if name.isidentifier() and name not in _FUNCTIONS]:
        raise _Wrong(f"there is no function {unknown[0]!r}")
    reads, bound, path = _scan(tokens)
    seen = {root for root, _ in reads} | bound | _TYPES
    reads += [(name, None) for name in names if name not in seen]
    return _Expression(source, program, tuple(dict.fromkeys(reads)), path)


def _scan(tokens: list[tuple[str, str]]) -> tuple[list[tuple[str, str | None]], set[str], tuple[str, ...]]:
    """What the tokens read, the names that macros bind, and the members where the whole is one plain path."""
    reads: list[tuple[str, str | None]] = []
    bound: set[str] = set()
    scopes: list[tuple[str, int]] = []  # variable of each open macro, with the depth of its parenthesis
    depth = macros = 0
    for i, (kind, text) in enumerate(tokens):
        if text in ("(", "[", "{") and kind == "mark":
            depth += 1
        elif text in (")", "]", "}") and kind == "mark":
            depth -= 1
            if scopes and scopes[-1][1] > depth:
                scopes.pop()
        if kind != "name" or text in _WORDS:
            continue
        after_dot = i > 0 and tokens[i - 1] == ("mark", ".")
        calls = i + 1 < len(tokens) and tokens[i + 1] == ("mark", "(")
        if after_dot and calls and text in _MACROS and i + 2 < len(tokens):
            macros += 1
            scopes.append((tokens[i + 2][1], depth + 1))
            bound.add(tokens[i + 2][1])
            if macros > MAX_MACROS or len(scopes) > MAX_MACRO_NESTING:
                raise _Wrong(
                    f"more than {MAX_MACROS} macros (map, filter, all, exists, exists_one), or more than"
                    f" {MAX_MACRO_NESTING} inside each other; compute this in a task"
                )
        elif not after_dot and not calls and text not in _TYPES and all(text != name for name, _ in scopes):
            members, end = _members(tokens, i + 1)
            reads.append((text, members[0] if members else None))
            if i == 0 and end == len(tokens):
                return reads, bound, (text, *members)
    return reads, bound, ()


def _members(tokens: list[tuple[str, str]], i: int) -> tuple[list[str], int]:
    """Constant member accesses from token `i` on, and the token after them."""
    members: list[str] = []
    while i + 1 < len(tokens):
        following = tokens[i + 2] if i + 2 < len(tokens) else ("", "")
        if tokens[i] == ("mark", ".") and tokens[i + 1][0] == "name" and following != ("mark", "("):
            members.append(tokens[i + 1][1])
            i += 2
        elif tokens[i] == ("mark", "[") and tokens[i + 1][0] == "string" and following == ("mark", "]"):
            literal = cel.compile(tokens[i + 1][1]).execute({})
            if not isinstance(literal, str):
                break
            members.append(literal)
            i += 3
        else:
            break
    return members, i


def _evaluate(expression: _Expression, scope: Mapping[str, Any]) -> tuple[Any, int]:
    """The value, and its size as JSON."""
    if expression.path:
        value = _walk(expression.path, scope)
    else:
        try:
            value = expression.program.execute(_narrow(expression.reads, scope))
        except Exception as exc:
            raise _Wrong(_cause(exc, expression.reads)) from None
    if isinstance(value, datetime):
        value = value.isoformat().replace("+00:00", "Z")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        raise _Wrong(f"gives {type(value).__name__} that is not JSON") from None
    if "\\u0000" in text or not _string_keys(value):
        raise _Wrong("gives a NUL character or a key that is not text")
    return value, size


def _walk(path: tuple[str, ...], scope: Mapping[str, Any]) -> Any:
    value: Any = scope
    for i, name in enumerate(path):
        if not isinstance(value, Mapping):
            raise _Wrong(f"{'.'.join(path[:i])} is {_kind(value)}, it has no {name!r}")
        if name not in value:
            known = ", ".join(_short(str(key), 40) for key in list(value)[:10]) or "nothing"
            raise _Wrong(f"{'.'.join(path[:i]) or 'the scope'} has no {name!r}; it has {known}")
        value = value[name]
    return value


def _narrow(reads: tuple[tuple[str, str | None], ...], scope: Mapping[str, Any]) -> dict[str, Any]:
    """Only what is read: the library copies all that it is handed."""
    narrow: dict[str, Any] = {}
    for root, name in reads:
        if root not in scope:
            continue
        whole = scope[root]
        if name is None or not isinstance(whole, Mapping):
            narrow[root] = dict(whole) if isinstance(whole, Mapping) else whole
        elif (part := narrow.setdefault(root, {})) is not whole and name in whole:
            part[name] = whole[name]
    return narrow


def _string_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _string_keys(item) for key, item in value.items())
    return all(map(_string_keys, value)) if isinstance(value, list | tuple) else True


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "no mapping")


def _cause(exc: Exception, reads: tuple[tuple[str, str | None], ...]) -> str:
    if isinstance(exc, KeyError):
        return f"there is no {exc.args[0]!r}" if exc.args else "a key is missing"
    if any(root == "secrets" for root, _ in reads):
        return f"{type(exc).__name__}; the details are withheld, for they may hold a secret"
    return _short(str(exc).split(". ")[0])


def _syntax(message: str) -> str:
    """The library repeats the source, then says `ERROR: <input>:1:4: Syntax error: ...`, once or more."""
    _, _, first = message.partition("ERROR: <input>:")
    line_column, _, rest = first.partition(": ")
    cause = rest.split("\n")[0].removeprefix("Syntax error: ").split(" expecting ")[0].replace("'<EOF>'", "end")
    return f"{_short(cause)} (at {line_column})" if cause else _short(message)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
