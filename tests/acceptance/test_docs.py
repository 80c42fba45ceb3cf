"""The reference pages say all that the code says, and nothing else.

After a change of settings, `python tests/acceptance/test_docs.py` writes the table of docs/settings.md anew.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from config.settings import Settings
from pipeline.app import import_modules
from pipeline.definition import RetryPolicy, TaskDefinition, WorkflowDefinition
from pipeline.document import DEFAULT_LIMITS, parse_document
from pipeline.handler import Handler, collect
from pipeline.templates import EXECUTION_FIELDS, MAX_EXPRESSION, MAX_OUTPUT, ROOTS
from pipeline.validation import validate

DOCS = Path(__file__).resolve().parents[2] / "docs"
SETTINGS = DOCS / "settings.md"
HANDLERS = collect(import_modules(Settings().handler_modules))
SECTIONS = dict(re.findall(r"^## ([a-z]+\.[a-z]+)\n(.*?)(?=^## |\Z)", (DOCS / "handlers.md").read_text("utf-8"), re.DOTALL | re.MULTILINE))
#: settings that are read from many variables
NAMED = {"connections": "PIPELINE_CONNECTION_NAME", "secrets": "PIPELINE_SECRET_NAME"}


def table(text: str) -> dict[str, list[str]]:
    """The rows of the tables in a text whose first cell is one name in backticks, by that name."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in rows}


def takes(name: str, schema: Mapping[str, Any]) -> str:
    """What values a setting takes, in words."""
    found = next((s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"), schema)
    low, high = found.get("minimum", found.get("exclusiveMinimum")), found.get("maximum")
    kind = {"string": "text", "array": "list, by commas", "boolean": "true or false", "object": "one variable each"}
    if "pattern" in found:
        choice = re.fullmatch(r"\^\((.*)\)\$", found["pattern"])
        return choice[1].replace("|", ", ") if choice else "name"
    if low is not None:
        return f"{low:,g} to {high:,g}" if high is not None else f"{'above' if 'exclusiveMinimum' in found else 'from'} {low:,g}"
    return kind[found["type"]]


def settings_table() -> str:
    """All settings, as docs/settings.md shows them."""
    schema = Settings.model_json_schema()["properties"]
    lines = ["| variable | takes | default | meaning |", "|---|---|---|---|"]
    for name, info in Settings.model_fields.items():
        variable = NAMED.get(name, f"PIPELINE_{name.upper()}")
        lines.append(f"| `{variable}` | {takes(name, schema[name])} | {default_text(info)} | {info.description} |")
    return "\n".join(lines).replace("<", "&lt;")


def default_text(info: FieldInfo) -> str:
    match info.get_default(call_default_factory=True):
        case None | () | {}:
            return ""
        case bool(flag):
            return str(flag).lower()
        case tuple(items):
            return ",".join(items)
        case int(number) | float(number):
            return f"{number:g}" if number < 10_000 else f"{number}"
        case value:
            return str(value)


def test_table_of_settings_is_that_of_the_code() -> None:
    assert settings_table() in SETTINGS.read_text("utf-8"), f"python {Path(__file__).name} writes it anew"


def test_every_handler_has_a_section_and_every_section_a_handler() -> None:
    assert set(SECTIONS) == set(HANDLERS)


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_section_of_a_handler_names_its_parameters_with_their_defaults(handler: Handler) -> None:
    shown = {name: cells[0] for name, cells in table(SECTIONS[handler.name]).items()}
    signature = inspect.signature(handler.function).parameters
    assert list(shown) == [parameter.name for parameter in handler.spec.parameters]
    for parameter in handler.spec.parameters:
        default = signature[parameter.name].default
        expected = "required" if parameter.required else json.dumps(default)
        assert shown[parameter.name] == expected, parameter.name


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_example_of_a_handler_is_valid(handler: Handler) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", SECTIONS[handler.name], flags=re.DOTALL | re.MULTILINE)
    tasks = parse_document(example, handler.name, "yaml").data
    assert [task["handler"] for task in tasks] == [handler.name]
    needed = [{"id": name, "handler": "debug.noop"} for task in tasks for name in task.get("dependencies", ())]
    validate({"id": "example", "tasks": [*tasks, *needed]}, {name: found.spec for name, found in HANDLERS.items()})


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_section_of_a_handler_names_the_settings_that_it_asks(handler: Handler) -> None:
    doc = inspect.getdoc(handler.function) or ""
    asked = set(re.findall(r"PIPELINE_[A-Z_]+[A-Z]", doc))
    assert {name for name in asked if name != "PIPELINE_CONNECTION"} <= set(re.findall(r"PIPELINE_[A-Z_]+", SECTIONS[handler.name]))


@pytest.mark.parametrize(
    ("heading", "model"), [("Workflow", WorkflowDefinition), ("Task", TaskDefinition), ("Retry policy", RetryPolicy)]
)
def test_table_of_a_model_names_its_fields_with_their_defaults(heading: str, model: type[BaseModel]) -> None:
    text = (DOCS / "definition.md").read_text("utf-8")
    shown = {name: cells[0] for name, cells in table(text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]).items()}
    assert set(shown) == set(model.model_fields)
    for name, info in model.model_fields.items():
        said = {"name": "the id", "retry_policy": "see below", "handler": "required"}
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        expected = "required" if info.is_required() else json.dumps(default) if not isinstance(default, BaseModel) else ""
        assert shown[name] == said.get(name, expected), name


def test_limits_and_roots_of_the_definition_page_are_those_of_the_code() -> None:
    text = (DOCS / "definition.md").read_text("utf-8")
    limits = text.partition("\n## Limits\n")[2].partition("\n## ")[0]
    settings = Settings()
    for number in (
        settings.max_tasks, settings.max_params_bytes, settings.max_result_bytes, DEFAULT_LIMITS.document_bytes,
        DEFAULT_LIMITS.depth, MAX_EXPRESSION, MAX_OUTPUT,
    ):  # fmt: skip
        assert f"| {number:,} " in limits or f"| {number:,} |" in limits, number
    templates = text.partition("\n## Templates\n")[2].partition("\n## ")[0]
    assert set(table(templates)) == set(ROOTS)
    assert set(re.findall(r"`(\w+)`", table(templates)["execution"][0])) == set(EXECUTION_FIELDS)


if __name__ == "__main__":
    written = re.sub(r"^\| variable .*?(?=^[^|]|\Z)", lambda _: settings_table() + "\n", SETTINGS.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    SETTINGS.write_text(written, "utf-8")
