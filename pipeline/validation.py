"""VALIDATE: every problem of a definition at once, each with its place and how to mend it; pure.

A task that is wrong does not hide what is wrong with others: each is read on its own, fields that cannot be used are
put aside, and the checks of graph, params and templates go on with the rest. What follows from a problem that is
already told is not told again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jsonschema_rs
from pydantic import BaseModel
from pydantic_core import to_json

from pipeline.catalogue import Catalogue
from pipeline.contents import Contents, TaskText, missing_parameters
from pipeline.definition import PLANNED_TYPES, RetryPolicy, TaskDefinition, WorkflowDefinition
from pipeline.document import DEFAULT_LIMITS, Document, Limits, of_data
from pipeline.errors import DefinitionError, InputError, Problem
from pipeline.problems import Problems, clip, is_json, schema_validator
from pipeline.templates import Path, has_templates, references

__all__ = ["MOST_PROBLEMS", "Limits", "check", "json_schema", "validate", "validate_input", "validate_inputs"]

#: of inputs that are checked together; who has more makes the same mistake in each
MOST_PROBLEMS = 50
_BY_REFERENCE = "hand on large data as an artifact"


def check(
    document: Document, catalogue: Catalogue | None, limits: Limits = DEFAULT_LIMITS
) -> tuple[WorkflowDefinition | None, tuple[Problem, ...]]:
    """The definition, where nothing is wrong, and everything that is wrong.

    Args:
        document: what was written.
        catalogue: the handlers; None: handlers and their params are not checked.
        limits: how large it may be.
    """
    found = Problems(document)
    if not isinstance(document.data, Mapping):
        found.add((), "a definition is a mapping", "begin with `id: name`")
        return None, found.sorted()
    data = dict(document.data)
    listed = data.pop("tasks", None)
    header = _header(found, data, limits)
    if not isinstance(listed, list | tuple) or not listed:
        found.add(("tasks",), "tasks must be a list of at least one task", "write `tasks:` and `- id: name` below")
        return None, found.sorted()
    if len(listed) > limits.tasks:
        found.add(("tasks",), f"{len(listed)} tasks, above the limit of {limits.tasks}", "split the workflow")
        return None, found.sorted()
    tasks = [_task(found, task, ("tasks", index), limits) for index, task in enumerate(listed)]
    Contents(found, tasks, data.get("variables", {}), data.get("input_schema"), catalogue).check()
    problems = found.sorted()
    if problems or header is None:
        return None, problems
    return header.model_copy(update={"tasks": tuple(task.model for task in tasks)}), ()


def validate(
    source: Document | Mapping[str, Any] | WorkflowDefinition,
    catalogue: Catalogue | None,
    limits: Limits = DEFAULT_LIMITS,
) -> WorkflowDefinition:
    """The definition that `source` says.

    Raises:
        DefinitionError: with every problem.
    """
    if isinstance(source, WorkflowDefinition):
        document = of_data(_fields_set(source), "<definition>")
    else:
        document = source if isinstance(source, Document) else of_data(source)
    definition, problems = check(document, catalogue, limits)
    if definition is None:
        raise DefinitionError(problems)
    return source if isinstance(source, WorkflowDefinition) else definition


def validate_input(
    definition: WorkflowDefinition, input_data: Any, catalogue: Catalogue | None, limits: Limits = DEFAULT_LIMITS
) -> None:
    """Check the input of an execution, as it is: defaults that the schema names are not filled in.

    Raises:
        InputError: with every problem.
    """
    if problems := _input_problems(definition, input_data, _needed_input(definition, catalogue), limits):
        raise InputError(problems)


def validate_inputs(
    definition: WorkflowDefinition, inputs: Sequence[Any], catalogue: Catalogue | None, limits: Limits = DEFAULT_LIMITS
) -> None:
    """Check the inputs of several executions.

    Raises:
        InputError: with every problem of all, or of the first that have many; the place begins with the input's: `inputs[3].day`.
    """
    needed, problems = _needed_input(definition, catalogue), list[Problem]()
    for number, input_data in enumerate(inputs):
        if len(problems) >= MOST_PROBLEMS:
            problems.append(Problem(path=f"inputs[{number}]", what="this one and those behind it were not checked"))
            break
        for problem in _input_problems(definition, input_data, needed, limits):
            inside = problem.path if problem.path.startswith("[") or not problem.path else f".{problem.path}"
            problems.append(replace(problem, path=f"inputs[{number}]{inside}", source=""))
    if problems:
        raise InputError(tuple(problems))


def _input_problems(
    definition: WorkflowDefinition, input_data: Any, needed: Mapping[str, Sequence[str]], limits: Limits
) -> tuple[Problem, ...]:
    found = Problems(Document(data=input_data, source="<input>"))
    if not isinstance(input_data, dict):
        found.add((), f"the input must be a JSON object, found {type(input_data).__name__}")
    elif found.json(input_data, (), limits.depth):
        if (size := len(to_json(input_data))) > limits.params_bytes:
            found.add((), f"the input has {size} bytes, above the limit of {limits.params_bytes}", _BY_REFERENCE)
        else:
            told: set[str] = set()
            if definition.input_schema is not None:
                told = found.schema(schema_validator(definition.input_schema), input_data, (), "")
            for name, tasks in needed.items():
                if name not in input_data and name not in told:
                    users = ", ".join(tasks[:5]) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
                    found.add((name,), f"{name} is missing: needed by {users}", "add it to the input")
    return found.sorted()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the format, for editors; what only `check` can see is not in it."""
    schema = WorkflowDefinition.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Workflow definition"}


def _fields_set(value: Any) -> Any:
    """Models as the mappings that they were made of, so that models and mappings are checked alike."""
    if isinstance(value, BaseModel):
        return {name: _fields_set(getattr(value, name)) for name in value.model_fields_set}
    if isinstance(value, tuple):
        return [_fields_set(item) for item in value]
    return value


def _header(found: Problems, data: dict[str, Any], limits: Limits) -> WorkflowDefinition | None:
    """All but the tasks; fields that cannot be used are taken out of `data`."""
    for key in [key for key, value in data.items() if not found.json({key: value}, (), limits.depth)]:
        del data[key]
    stand_in = TaskDefinition(id="stand-in")
    header, wrong = found.model(WorkflowDefinition, {**data, "tasks": (stand_in,)}, ())
    if data.get("triggers") and "triggers" not in wrong:
        found.add(("triggers",), "triggers are not yet run by this version", "start it with `pipeline run`")
    if has_templates(data.get("variables")):
        found.add(("variables",), "variables are constants, templates work in params only", "move the template there")
    schema = data.get("input_schema")
    if isinstance(schema, dict):
        try:
            schema_validator(schema)
        except ValueError as exc:
            place = exc.instance_path if isinstance(exc, jsonschema_rs.ValidationError) else []
            text = exc.message if isinstance(exc, jsonschema_rs.ValidationError) else str(exc)
            how = "write it out in place: other documents are never fetched" if "etriev" in text else ""
            found.add(("input_schema", *place), f"not a JSON Schema: {clip(text.splitlines()[0])}", how)
            data["input_schema"] = None
    for field in wrong & data.keys():
        del data[field]
    return header


def _task(found: Problems, data: Any, path: Path, limits: Limits) -> TaskText:
    data = _fields_set(data)
    if not isinstance(data, dict):
        found.add(path, "a task must be a mapping", "begin with `- id: name`")
        data = {}
        wrong: frozenset[Any] = frozenset({"id", "dependencies", "params", "handler"})
        model = None
    else:
        data = {key: _fields_set(v) if isinstance(v, RetryPolicy) else v for key, v in data.items()}
        unusable = frozenset[Any]()
        if not is_json(data, limits.depth - len(path)):
            unusable = frozenset(key for key, value in data.items() if not _usable(found, key, value, path, limits))
        kept = {key: value for key, value in data.items() if key not in unusable} if unusable else data
        if "id" in unusable:
            kept = {**kept, "id": "stand-in"}
        model, wrong = found.model(TaskDefinition, kept, path)
        wrong |= unusable
        _planned(found, kept, wrong, path)
    usable = {key: value for key, value in data.items() if key not in wrong} if wrong else data
    id_ = usable.get("id")
    if isinstance(id_, str) and id_.startswith("__"):
        found.add((*path, "id"), f"id {id_!r} is reserved", "begin it with a letter or a digit")
    params = usable.get("params", {})
    if "params" not in wrong and (size := len(to_json(params))) > limits.params_bytes:
        how = _BY_REFERENCE
        found.add((*path, "params"), f"params have {size} bytes, above the limit of {limits.params_bytes}", how)
        wrong |= {"params"}
    needed = data.get("dependencies", ())
    plain_task = usable.get("type", "task") == "task" and "type" not in wrong
    handler = usable.get("handler") if plain_task else None
    if plain_task and handler is None and "handler" not in wrong:
        found.add((*path, "handler"), f"task {id_ or '?'!r} has no handler", "name one: `handler: family.verb`")
    return TaskText(
        path=path,
        id=id_,
        handler=handler,
        params=None if "params" in wrong else params,
        dependencies=tuple(n for n in needed if isinstance(n, str)) if isinstance(needed, list | tuple) else (),
        doubtful="dependencies" in wrong,
        mapped=data.get("foreach") is not None,
        model=model,
    )


def _usable(found: Problems, key: Any, value: Any, path: Path, limits: Limits) -> bool:
    if not isinstance(key, str):
        return found.json({key: value}, path, limits.depth)
    return found.json(value, (*path, key), limits.depth)


def _planned(found: Problems, data: Mapping[str, Any], wrong: frozenset[str], path: Path) -> None:
    kind = data.get("type")
    if kind in PLANNED_TYPES and "type" not in wrong:
        found.add((*path, "type"), f"tasks of type {kind!r} are not yet run by this version", "use type task")
    for field, how in (("when", "let the handler raise Skip"), ("foreach", "write the tasks out")):
        if data.get(field) is not None and field not in wrong:
            found.add((*path, field), f"{field} is not yet run by this version", how)


def _needed_input(definition: WorkflowDefinition, catalogue: Catalogue | None) -> dict[str, list[str]]:
    """Names without which tasks surely fail, each with those tasks."""
    needed: dict[str, list[str]] = {}
    for task in definition.tasks:
        spec = catalogue.get(task.handler) if catalogue is not None and task.handler is not None else None
        names = dict.fromkeys(missing_parameters(spec, task.params, task.dependencies) if spec is not None else ())
        found = references(task.params) if task.params else ()
        read = (r.name for r in found if r.plain and r.root == "input" and r.name is not None)
        for name in (*names, *(name for name in read if name not in names)):
            users = needed.setdefault(name, [])
            if users[-1:] != [task.id]:
                users.append(task.id)
    return needed
