"""What may import what, which library has which door, and how modules are named and sized: read from the sources."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("pipeline", "handlers", "config")
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
PIPELINE = [path for path in SOURCES if path.is_relative_to(ROOT / "pipeline")]
LINES = 400

STORE = {"result_store.rows", "result_store.connection", "result_store.store"}
RUN = {"errors", "states", *STORE}

#: each module of the pipeline, and the only modules of ours that it may import; a new module needs a line here
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "states": set(),
    "catalogue": set(),
    "graph": set(),
    "redaction": set(),
    "definition": {"errors"},
    "artifacts": {"errors"},
    "handler": {"artifacts", "catalogue", "errors"},
    "document": {"errors"},
    "templates": {"errors"},
    "problems": {"document", "errors", "templates"},
    "contents": {"catalogue", "definition", "errors", "graph", "problems", "templates"},
    "validation": {"catalogue", "contents", "definition", "document", "errors", "graph", "problems", "templates"},
    "submission": {"errors"},
    "builder": {"definition", "document", "errors", "validation"},
    "compiler": {"definition", "errors", "graph"},
    "picture": {"compiler", "definition"},
    "drawing": {"compiler", "definition", "picture"},
    "result_store": set(),
    "result_store.statements": set(),
    "result_store.rows": {"states"},
    "result_store.connection": {"errors", "result_store.statements"},
    "result_store.migrations": {"errors", "result_store.connection", "result_store.statements"},
    "result_store.door": {"result_store.connection", "result_store.rows", "result_store.statements"},
    "result_store.definitions": {"errors", "result_store.door"},
    "result_store.executions": {"errors", "states", "result_store.door", "result_store.rows"},
    "result_store.attempts": {"errors", "result_store.door", "result_store.rows"},
    "result_store.fleet": {"result_store.door", "result_store.rows"},
    "result_store.store": {
        "errors",
        "result_store.attempts", "result_store.connection", "result_store.definitions", "result_store.executions",
        "result_store.fleet", "result_store.rows",
    },
    "redis_transport": set(),
    "dispatch": {"compiler", "definition", *RUN},
    "attendance": {"handler", *RUN},
    "attendant": {"attendance", "handler", *RUN},
    "payload": {"errors", "redaction"},
    "events": set(),
    "turn": {"attendant", "dispatch", "events", *RUN},
    "execution": {
        "artifacts", "attendance", "attendant", "definition", "dispatch", "events", "handler", "payload", "redaction",
        "templates", "turn", *RUN,
    },
    "result_backend": {"execution", "redaction", *RUN},
    "recovery": {"dispatch", *RUN},
    "retention": {"errors", "observe", *RUN},
    "pulse": {"errors", *RUN},
    "beat": {"errors"},
    "triggers": {"definition", "dispatch", *RUN},
    "observe": RUN,
    "servers": {"errors"},
    "embedded": {"errors", "servers"},
    "stack": {"errors"},
    "worker": {"errors", "execution", "result_store.migrations"},
    "app": {
        "catalogue", "dispatch", "document", "embedded", "execution", "handler", "recovery", "redaction", "redis_transport",
        "result_backend", "result_store.migrations", "retention", "triggers", "worker", "config", *RUN,
    },
    "engine": {
        "app", "builder", "catalogue", "compiler", "definition", "document", "observe", "submission", "validation", "config",
        *RUN,
    },
    "local": {"app", "errors", "stack"},
    "display": {"engine", "errors", "observe", "result_store.rows", "states"},
    "processes": {"app", "display", "errors", "local", "pulse", "result_store.migrations"},
    "commands": {
        "app", "catalogue", "compiler", "definition", "display", "document", "drawing", "engine", "errors", "handler", "local",
        "observe", "pulse", "recovery", "result_store.migrations", "stack", "states", "validation", "config",
    },
    "cli": {"app", "commands", "processes", "drawing", "engine", "errors", "local", "states"},
    "testing.fault": set(),
    "testing.ledger": {"result_store.rows"},
    "testing.handlers": {"errors", "handler", "testing.ledger"},
    "testing.injection": {"app", "dispatch", "execution", "testing.fault", "testing.ledger", *RUN},
    "testing.proxy": set(),
    "testing.workload": {"definition"},
    "testing.checks": {"states", "testing.ledger"},
    "testing.arena": {"embedded", "engine", "result_store.migrations", "servers", "testing.proxy", "config", *RUN},
    "testing.fleet": {"errors", "testing.arena"},
    "testing.outside": {"result_store.rows", "testing.fault", "testing.fleet", "testing.proxy", "testing.arena"},
    "testing.campaign": {
        "definition", "errors", "testing.checks", "testing.fault", "testing.fleet", "testing.ledger", "testing.outside",
        "testing.arena",
    },
    "testing.report": {"testing.fault"},
    "testing.kit": {
        "definition", "document", "testing.campaign", "testing.checks", "testing.fault", "testing.fleet", "testing.report",
        "testing.arena", "testing.workload",
    },
    "testing.scenarios": {"testing.campaign", "testing.fault", "testing.fleet", "testing.kit", "testing.workload"},
    "testing": {"testing.checks", "testing.fault", "testing.kit", "testing.report"},
    "testing.__main__": {
        "app", "document", "errors", "testing.campaign", "testing.fault", "testing.kit", "testing.report",
        "testing.scenarios",
    },
    "__main__": {"cli"},
    "": {
        "app", "artifacts", "builder", "definition", "engine", "errors", "handler", "observe", "result_store.rows",
        "states",
    },
}  # fmt: skip

#: library (or part of one) and the only files that may import it
DOORS = {
    "psycopg": r"pipeline/result_store/\w+\.py|handlers/postgres\.py",
    "celery.canvas": r"pipeline/(compiler|dispatch)\.py",
}
CANVAS = {"chain", "chord", "chunks", "group", "maybe_signature", "signature", "subtask", "xmap", "xstarmap"}
#: the only reader of the environment
ENVIRONMENT = "config/settings.py"
EMPTY_NAMES = {"base", "common", "core", "helper", "helpers", "lib", "manager", "misc", "shared", "util", "utils"}


def name_of(path: Path) -> str:
    """Dotted, as it is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in SOURCES}


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import wherever it stands, as the module it reaches, or `module.name` for what is no module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, "." * node.level + f"{node.module or ''}.{alias.name}") for alias in node.names)


def module(target: str) -> str:
    """The module of ours behind an import; the rest of the name is something in it."""
    while target not in MODULES and "." in target:
        target = target.rpartition(".")[0]
    return target


def is_ours(target: str) -> bool:
    return target.startswith(".") or target.partition(".")[0] in OURS


def forbidden_imports(name: str, tree: ast.AST) -> list[str]:
    """What the module imports of ours and may not."""
    wrong = []
    public = {target.rpartition(".")[2] for _, target in imported(parse(ROOT / "pipeline/__init__.py"))}
    for _, target in imported(tree):
        if not is_ours(target):
            continue
        package, _, inner = module(target).partition(".")
        if name.startswith("handlers"):
            allowed = package == "handlers" or (target.removeprefix("pipeline.") in public and package == "pipeline")
        elif name.startswith("config"):
            allowed = package == "config"
        else:
            own = name.partition(".")[2]
            allowed = (inner if package == "pipeline" else package) in MAY_IMPORT.get(own, set())
            allowed = allowed and not (package == "pipeline" and not inner)
        if not allowed:
            wrong.append(target)
    return wrong


def forbidden_doors(path: str, tree: ast.AST) -> list[str]:
    """Libraries that the file imports though another has the door, and readings of the environment."""
    wrong = []
    for _, target in imported(tree):
        first, _, rest = target.partition(".")
        used = "celery.canvas" if first == "celery" and rest.partition(".")[0] in CANVAS | {"canvas"} else first
        if used in DOORS and not re.fullmatch(DOORS[used], path):
            wrong.append(target)
        if re.fullmatch(r"os\.(environb?|getenvb?)", target) and path != ENVIRONMENT:
            wrong.append(target)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and path != ENVIRONMENT:
            called = f"{node.value.id}.{node.attr}"
            if re.fullmatch(r"os\.(environb?|getenvb?)", called):
                wrong.append(called)
            if node.value.id == "celery" and node.attr in CANVAS and not re.fullmatch(DOORS["celery.canvas"], path):
                wrong.append(called)
    return wrong


def late_imports(name: str, tree: ast.AST) -> list[str]:
    """Imports of ours inside a function: a late import means a wrong layer."""
    return [
        target
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and not (name == "pipeline" and getattr(function, "name", "") == "__getattr__")
        for _, target in imported(function)
        if is_ours(target)
    ]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def the_map() -> str:
    return ast.get_docstring(parse(ROOT / "pipeline/__init__.py")) or ""


every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
every_stage = pytest.mark.parametrize("path", PIPELINE, ids=lambda path: str(path.relative_to(ROOT)))


@every_source
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    assert forbidden_imports(name_of(path), parse(path)) == []


@every_source
def test_module_uses_only_the_libraries_that_it_has_the_door_to(path: Path) -> None:
    assert forbidden_doors(str(path.relative_to(ROOT)), parse(path)) == []


@every_source
def test_module_imports_ours_at_the_top_and_absolutely(path: Path) -> None:
    assert late_imports(name_of(path), parse(path)) == []
    assert [target for _, target in imported(parse(path)) if target.startswith(".")] == []


@every_source
def test_module_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


@every_source
def test_module_name_says_something(path: Path) -> None:
    assert path.stem not in EMPTY_NAMES
    assert not path.stem.endswith(("_utils", "_helpers", "_manager"))


@every_stage
def test_stage_is_in_the_table_and_not_named_after_the_standard_library(path: Path) -> None:
    name = name_of(path).partition(".")[2]
    if not name.startswith("result_store.migrations."):
        assert name in MAY_IMPORT
    assert path.stem == "__init__" or path.stem == "__main__" or path.stem not in sys.stdlib_module_names


@every_stage
def test_stage_is_on_the_map_of_the_package(path: Path) -> None:
    named = path.relative_to(ROOT / "pipeline").with_suffix("").parts[0]
    assert named in ("__init__", "__main__") or re.search(rf"\b{named}\b", the_map())


def test_map_of_the_package_names_nothing_that_is_not_there() -> None:
    rows = re.findall(r"^[A-Z]{3,} +([a-z_]+(?:  [a-z_]+)*)(?= {3}|$)", the_map(), re.MULTILINE)
    assert len(rows) >= 8
    assert [name for row in rows for name in row.split() if f"pipeline.{name}" not in MODULES] == []


def test_table_has_a_direction() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("pipeline.errors", "import pipeline.states"),
        ("pipeline.definition", "from pipeline import TaskStatus"),
        ("pipeline.states", "from pipeline import errors"),
        ("pipeline.compiler", "import handlers.debug"),
        ("pipeline.compiler", "from config.settings import Settings"),
        ("pipeline.recovery", "from pipeline.execution import x"),
        ("pipeline.unheard_of", "from pipeline.errors import PipelineError"),
        ("pipeline.compiler", "from .errors import PipelineError"),
        ("handlers.debug", "from pipeline.handler import handler"),
        ("handlers.debug", "import pipeline"),
        ("handlers.debug", "from pipeline import states"),
        ("config.settings", "from pipeline import handler"),
    ],
)
def test_forbidden_import_is_found(name: str, source: str) -> None:
    assert forbidden_imports(name, ast.parse(source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipeline/engine.py", "import psycopg"),
        ("pipeline/engine.py", "from psycopg.rows import dict_row"),
        ("pipeline/execution.py", "from celery import Task, chain"),
        ("pipeline/execution.py", "from celery.canvas import Signature"),
        ("pipeline/execution.py", "import celery\ncelery.group()"),
        ("pipeline/cli.py", "import os\nos.environ['X']"),
        ("pipeline/cli.py", "from os import getenv"),
        ("handlers/shell.py", "import os\nos.getenv('X')"),
    ],
)
def test_forbidden_door_is_found(path: str, source: str) -> None:
    assert forbidden_doors(path, ast.parse(source))


def test_late_import_is_found_and_lazy_names_of_the_package_are_allowed() -> None:
    late = "def {}():\n    from pipeline.errors import PipelineError"
    assert late_imports("pipeline.cli", ast.parse(late.format("run")))
    assert late_imports("pipeline", ast.parse(late.format("run")))
    assert late_imports("pipeline.cli", ast.parse(late.format("__getattr__")))
    assert not late_imports("pipeline", ast.parse(late.format("__getattr__")))
    assert not late_imports("pipeline.cli", ast.parse("def run():\n    import json"))
