"""What the tasks of a definition say about each other, and about handlers, variables and input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from pipeline.catalogue import Catalogue, HandlerSpec
from pipeline.definition import TaskDefinition
from pipeline.graph import cycles, missing_ancestors, topological_order
from pipeline.problems import Problems, clip, schema_validator
from pipeline.templates import EXECUTION_FIELDS, ROOTS, Path, Reference, has_templates, survey

#: keywords of JSON Schema by which more properties than the listed ones may be meant
_OPEN_KEYWORDS = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties")
_LONGEST_CYCLE = 20  # tasks of a cycle that are printed


@dataclass(frozen=True, kw_only=True)
class TaskText:
    """One task, as far as it can be read."""

    path: Path
    #: None where it has no id that can be used
    id: str | None
    handler: str | None
    #: None where they cannot be looked at
    params: dict[str, Any] | None
    #: names only; not all known where `doubtful`
    dependencies: tuple[str, ...]
    doubtful: bool
    mapped: bool
    model: TaskDefinition | None


class Contents:
    """What the tasks say about each other, about handlers, variables and input."""

    def __init__(
        self,
        found: Problems,
        tasks: Sequence[TaskText],
        variables: Any,
        input_schema: Any,
        catalogue: Catalogue | None,
    ) -> None:
        self.found, self.tasks, self.catalogue = found, tasks, catalogue
        self.variables = variables if isinstance(variables, dict) else None
        self.input_names = _input_names(input_schema)
        self.numbers: dict[str, int] = {}
        self.validators: dict[tuple[str, str], jsonschema_rs.Validator | None] = {}

    def check(self) -> None:
        for number, task in enumerate(self.tasks):
            if task.id is not None and self.numbers.setdefault(task.id, number) != number:
                first = self.tasks[self.numbers[task.id]].path
                where = f"tasks[{first[1]}]{self.found.line_words(first)}"
                self.found.add(
                    (*task.path, "id"), f"id {task.id!r} is taken by {where}", "ids are unique in a workflow"
                )
        doubtful = {number for number, task in enumerate(self.tasks) if task.doubtful}
        graph = [self._dependencies(number, task, doubtful) for number, task in enumerate(self.tasks)]
        order = topological_order(graph)
        if len(order) < len(graph):
            for cycle in cycles(graph, order):
                self._cycle(cycle)
        reads: dict[tuple[int, int], Path] = {}
        for number, task in enumerate(self.tasks):
            self._handler(task, number in doubtful)
            if task.params is not None:
                self._templates(number, task, task.params, reads)
        for pair in sorted(missing_ancestors(graph, order, reads, doubtful)):
            other = self.tasks[pair[1]].id
            what = f"reads the result of task {other!r}, which need not have run before"
            self.found.add(reads[pair], what, f"add {other} to dependencies")

    def _dependencies(self, number: int, task: TaskText, doubtful: set[int]) -> list[int]:
        """Numbers of the dependencies that exist; records the others."""
        needed: dict[int, None] = {}
        for index, name in enumerate(task.dependencies):
            place, other = (*task.path, "dependencies", index), self.numbers.get(name)
            if name == task.id:
                self.found.add(place, f"task {name!r} depends on itself", "take it out")
            elif other is None:
                doubtful.add(number)
                how = self.found.nearest(name, self.numbers, "no task has that id")
                self.found.add(place, f"task {task.id or '?'!r} depends on unknown task {name!r}", how)
            elif other in needed:
                self.found.add(place, f"dependency {name!r} stands twice", "take one out")
            else:
                needed[other] = None
        return list(needed)

    def _cycle(self, cycle: list[int]) -> None:
        names = [str(self.tasks[number].id) for number in cycle]
        if len(names) > _LONGEST_CYCLE + 1:
            half = _LONGEST_CYCLE // 2
            names = [*names[:half], f"... {len(names) - 2 * half} more ...", *names[-half:]]
        path = (*self.tasks[cycle[0]].path, "dependencies")
        self.found.add(path, f"a cycle: {' -> '.join(names)}", "take out one of these dependencies")

    def _handler(self, task: TaskText, doubtful: bool) -> None:
        if self.catalogue is None or task.handler is None:
            return
        spec = self.catalogue.get(task.handler)
        if spec is None:
            how = self.found.nearest(task.handler, self.catalogue, "is its module in PIPELINE_HANDLERS?")
            self.found.add((*task.path, "handler"), f"unknown handler {task.handler!r}", how)
        elif task.params is not None:
            self._params(task, task.params, spec, doubtful)

    def _params(self, task: TaskText, params: dict[str, Any], spec: HandlerSpec, doubtful: bool) -> None:
        place = (*task.path, "params")
        parameters = {parameter.name: parameter for parameter in spec.parameters}
        for name, value in params.items():
            parameter = parameters.get(name)
            if parameter is None:
                if not spec.open_ended:
                    takes = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
                    how = self.found.nearest(name, parameters, takes)
                    self.found.add((*place, name), f"handler {spec.name!r} has no parameter {name!r}", how)
            elif parameter.schema and not has_templates(value):
                validator = self._validator(spec.name, name, parameter.schema)
                if validator is not None:
                    self.found.schema(validator, value, (*place, name), f"does not fit handler {spec.name!r}: ")
        if self.input_names is None or doubtful:
            return
        for name in missing_parameters(spec, params, task.dependencies):
            if name not in self.input_names:
                what = f"task {task.id or '?'!r} lacks {name!r}, which handler {spec.name!r} requires"
                self.found.add(place, what, "add it to params, or to input_schema")

    def _validator(self, handler: str, name: str, schema: dict[str, Any]) -> jsonschema_rs.Validator | None:
        if (handler, name) not in self.validators:
            try:
                self.validators[handler, name] = schema_validator(schema)
            except ValueError:  # the handler's own types say more than JSON Schema can: checked when the task runs
                self.validators[handler, name] = None
        return self.validators[handler, name]

    def _templates(
        self, number: int, task: TaskText, params: dict[str, Any], reads: dict[tuple[int, int], Path]
    ) -> None:
        place = (*task.path, "params")
        read, faults = survey(params)
        for fault in faults:
            how = self._hyphen(fault.expression)
            self.found.add((*place, *fault.at), f"template {{{{ {clip(fault.expression)} }}}}: {fault.cause}", how)
        hinted: set[tuple[Path, str]] = set()
        for reference in read:
            here = (*place, *reference.at)
            if reference.root == "tasks" and reference.name in self.numbers:
                other = self.numbers[reference.name]
                if other == number:
                    self.found.add(here, f"task {task.id!r} reads its own result", "it has none before it ends")
                else:
                    reads.setdefault((number, other), here)
                continue
            what, how = self._unknown(reference, task)
            if not what or (here, reference.expression) in hinted:
                continue
            if hyphen := self._hyphen(reference.expression):
                hinted.add((here, reference.expression))
                how = hyphen
            self.found.add(here, f"template {{{{ {clip(reference.expression.strip())} }}}}: {what}", how)

    def _unknown(self, reference: Reference, task: TaskText) -> tuple[str, str]:
        """What is wrong with a reference, other than to a task that exists; nothing where nothing is."""
        nearest, root, name = self.found.nearest, reference.root, reference.name
        if root not in ROOTS:
            return f"unknown name {root!r}", nearest(root, ROOTS, f"a template reads {', '.join(ROOTS)}")
        if root == "item":
            return ("", "") if task.mapped else ("item exists only in a task with foreach", "read input or tasks")
        if root in ("tasks", "secrets") and name is None:
            return (
                f"{root} must be read one by one, by a name that is written out",
                f'write {root}.NAME or {root}["NAME"]',
            )
        if name is None or root == "secrets":
            return "", ""
        if root == "tasks":
            return f"unknown task {name!r}", nearest(name, self.numbers, "no task has that id")
        known: Iterable[str] | None = {
            "variables": self.variables,
            "input": self.input_names,
            "execution": EXECUTION_FIELDS,
        }[root]
        if known is None or name in known:
            return "", ""
        names = list(known)
        if root == "input":
            return f"input_schema has no property {name!r}", nearest(name, names, "add it to input_schema")
        return f"{root} has no {name!r}", nearest(name, names, f"it has {', '.join(names[:10]) or 'nothing'}")

    def _hyphen(self, expression: str) -> str:
        """Where a name with a hyphen or dot was written after a dot: how to write it."""
        known = {"tasks": self.numbers, "variables": self.variables or {}, "input": self.input_names or ()}
        for root, text in re.findall(r"\b(tasks|variables|input)\s*\.\s*([A-Za-z0-9_.-]+)", expression):
            ends = [end for end in range(len(text), 0, -1) if text[:end] in known[root]]
            if ends and not text[: ends[0]].isidentifier():
                return f'write {root}["{text[: ends[0]]}"]'
        return ""


def _input_names(schema: Any) -> frozenset[str] | None:
    """Names that the input can have; None: any."""
    if not isinstance(schema, dict) or any(keyword in schema for keyword in _OPEN_KEYWORDS):
        return None
    properties, more = schema.get("properties"), schema.get("additionalProperties")
    if more is False or (isinstance(properties, dict) and more is None):
        return frozenset(properties or ())
    return None


def missing_parameters(spec: HandlerSpec, params: Mapping[str, Any], dependencies: Iterable[str]) -> list[str]:
    """Required parameters that neither params nor dependencies give."""
    lacking = [p.name for p in spec.parameters if p.required and p.name not in params]
    given = {form for name in dependencies for form in (name, re.sub("[-.]", "_", name))} if lacking else ()
    return [name for name in lacking if name not in given]
