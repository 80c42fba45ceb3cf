"""What each command of the command line does; each returns whether all went well, errors are raised."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from config.settings import Settings
from pipeline.app import Installation, import_modules, read_settings
from pipeline.compiler import compile_workflow
from pipeline.definition import WorkflowDefinition
from pipeline.display import execution_table, execution_view, headline, say, task_table, watch
from pipeline.document import Document, Limits, parse_document, read_document
from pipeline.drawing import draw
from pipeline.engine import WorkflowEngine
from pipeline.errors import DefinitionError, InputError, Problem
from pipeline.handler import collect
from pipeline.local import Workers, somebody_works
from pipeline.observe import Execution, summary_dict, to_json
from pipeline.result_store.migrations import require_current
from pipeline.states import ExecutionStatus
from pipeline.validation import json_schema
from pipeline.validation import validate as validate_definition

#: characters of a result that are shown after a run
_ANSWER_LENGTH = 1_000

Command = Callable[[Namespace], bool]

#: columns of a table that is not shown on a terminal
_WIDE = 1000


def demo(arguments: Namespace) -> bool:
    """Run the flights of New York and show where the report is."""
    path = Path(str(resources.files("config.workflows").joinpath("nyc_flights.yaml")))
    console = _console()
    with _engine() as engine, _workers(engine.installation):
        definition = engine.validate(read_document(path, engine.installation.limits))
        console.print(
            f"{definition.name}: {len(definition.tasks)} tasks, from {path}", markup=False, highlight=False, soft_wrap=True
        )
        execution_id = engine.execute_workflow(definition, {}, user_id="demo")
        with _goes_on(execution_id):
            execution = watch(engine, execution_id, console)
        console.print(task_table(execution.tasks.values()))
        console.print(headline(execution), markup=False, soft_wrap=True)
        for name, uri in _files(execution):
            console.print(f"{name}: {uri}", markup=False, highlight=False, soft_wrap=True)
    return execution.status is ExecutionStatus.SUCCESS


def _files(execution: Execution) -> Iterator[tuple[str, str]]:
    """Pages and pictures among the results, by the task that made them."""
    for task_id, result in execution.results.items():
        for name, value in ({"": result, **result} if isinstance(result, dict) else {}).items():
            if isinstance(value, dict) and str(value.get("media_type", "")).startswith(("text/html", "image/")):
                yield f"{task_id}{f' {name}' if name else ''}", str(value["uri"])


def validate(arguments: Namespace) -> bool:
    """Report every problem of every file."""
    settings = read_settings()
    limits = _limits(settings)
    catalogue = {h.name: h.spec for h in collect(import_modules(settings.handler_modules)).values()}
    problems: list[Problem] = []
    for file in arguments.files:
        try:
            definition = validate_definition(read_document(file, limits), catalogue, limits)
        except DefinitionError as exc:
            problems.extend(exc.problems)
        else:
            print(f"{file}: {definition.id}@{definition.version} is valid, {len(definition.tasks)} tasks")
    if problems:
        raise DefinitionError(tuple(problems))
    return True


def compile_(arguments: Namespace) -> bool:
    """Show groups and chords; the handlers are not needed for that."""
    limits = _limits(read_settings())
    definition = validate_definition(read_document(arguments.file, limits), None, limits)
    print(draw(compile_workflow(definition), definition, arguments.format))
    return True


def schema(arguments: Namespace) -> bool:
    """Print the JSON Schema."""
    print(to_json(json_schema()))
    return True


def handlers(arguments: Namespace) -> bool:
    """List handlers with their parameters."""
    found = collect(import_modules(read_settings().handler_modules))
    console = Console()
    for name in sorted(found):
        spec = found[name].spec
        names = [p.name + ("" if p.required else "?") for p in spec.parameters] + ["..."] * spec.open_ended
        console.print(f"[bold]{name}[/bold]({', '.join(names)})", highlight=False, soft_wrap=True)
        console.print(f"    {spec.summary}", markup=False, highlight=False, soft_wrap=True)
    return True


def register(arguments: Namespace) -> bool:
    """Record definitions: all of them are checked before the first is recorded."""
    with _engine() as engine:
        definitions = [engine.validate(read_document(file, engine.installation.limits)) for file in arguments.files]
        for definition in definitions:
            engine.register(definition)
            print(f"{definition.id}@{definition.version}")
    return True


def run(arguments: Namespace) -> bool:
    """Enqueue a workflow and wait for it."""
    limits = _limits(read_settings())
    data = _input(arguments.input, limits)
    workflow = _workflow(arguments.workflow, limits)
    with _engine() as engine:
        execution_id = engine.execute_workflow(
            workflow, data, user_id=arguments.user, idempotency_key=arguments.idempotency_key
        )
        if arguments.no_wait:
            print(to_json({"execution_id": execution_id}) if arguments.json else execution_id)
            return True
        say(execution_id)
        with _goes_on(execution_id), _workers(engine.installation):
            with _goes_on(execution_id):
                if arguments.json:
                    execution = engine.wait(execution_id, arguments.timeout)
                else:
                    execution = watch(engine, execution_id, _console(), arguments.timeout)
            _show(execution, as_json=arguments.json)
            if not arguments.json:
                for line in _answers(engine, execution):
                    print(line)
    return execution.status is ExecutionStatus.SUCCESS


def _answers(engine: WorkflowEngine, execution: Execution) -> Iterator[str]:
    """The results of the tasks that nothing depends on, as far as they are short."""
    definition = WorkflowDefinition.from_json(engine.installation.store.definition_of(execution.execution_id))
    needed = {name for task in definition.tasks for name in task.dependencies}
    for name, result in execution.results.items():
        if name not in needed and result is not None:
            text = json.dumps(result, ensure_ascii=False)
            full = f"... ({len(text):,} characters; `pipeline status {execution.execution_id} --json` has all of it)"
            yield f"{name}: {text if len(text) <= _ANSWER_LENGTH else text[:_ANSWER_LENGTH] + full}"


def status(arguments: Namespace) -> bool:
    """Show an execution."""
    with _engine() as engine:
        if arguments.watch:
            execution = watch(engine, arguments.execution, _console())
        else:
            execution = engine.get_execution(arguments.execution)
    _show(execution, as_json=arguments.json)
    return not arguments.watch or execution.status is ExecutionStatus.SUCCESS


def list_(arguments: Namespace) -> bool:
    """List executions."""
    with _engine() as engine:
        found = engine.list_executions(arguments.status, arguments.limit)
    if arguments.json:
        print(to_json([summary_dict(row) for row in found]))
    elif found:
        _console().print(execution_table(found))
    else:
        say("no executions")
    return True


def steer(arguments: Namespace) -> bool:
    """Cancel, pause, resume or retry."""
    with _engine() as engine:
        getattr(engine, arguments.command)(arguments.execution, arguments.user)
        print(headline(engine.get_execution(arguments.execution)))
    return True


def rerun(arguments: Namespace) -> bool:
    """Run an ended execution again from a task."""
    with _engine() as engine:
        params = None
        if arguments.params is not None:
            params = _input(arguments.params, engine.installation.limits, "--params")
        engine.rerun(arguments.execution, arguments.task, params=params, user_id=arguments.user)
        print(headline(engine.get_execution(arguments.execution)))
    return True


def mark(arguments: Namespace) -> bool:
    """Decide a task by hand."""
    with _engine() as engine:
        result = _json(arguments.result, engine.installation.limits, "--result", "write JSON, as '{\"rows\": 7}'")
        engine.mark(
            arguments.execution, arguments.task, arguments.status, reason=arguments.reason, result=result,
            user_id=arguments.user,
        )  # fmt: skip
        print(headline(engine.get_execution(arguments.execution)))
    return True


def _engine() -> WorkflowEngine:
    return WorkflowEngine()


@contextmanager
def _workers(installation: Installation) -> Iterator[None]:
    """A worker for as long as this lasts, where nobody works.

    The first Ctrl-C lets its tasks end, a second one kills them.
    """
    require_current(installation.database_url)
    if somebody_works(installation):
        yield
        return
    say("no worker is running: starting one")
    concurrency = installation.settings.concurrency
    with Workers(installation, workers=1, concurrency=concurrency, flower=False, catch_signals=False):
        yield


def _workflow(name: str, limits: Limits) -> Document | str:
    """A file, or the id of a registered workflow."""
    path = Path(name)
    return read_document(path, limits) if path.suffix in (".yaml", ".yml", ".json") or path.is_file() else name


def _input(text: str, limits: Limits, source: str = "--input") -> dict[str, Any]:
    """A JSON object, given as text or as @FILE."""
    content = text.encode()
    if text.startswith("@"):
        source = text[1:]
        try:
            with Path(source).open("rb") as file:
                content = file.read(limits.document_bytes + 1)
        except OSError as exc:
            problem = Problem(path="", what=f"cannot be read: {exc.strerror or exc}", source=source)
            raise InputError((problem,)) from exc
    how = f"""write a JSON object, as {source if source.startswith("--") else "--input"} '{{"day": "monday"}}'"""
    data = _json(content, limits, source, how)
    if not isinstance(data, dict):
        raise InputError((Problem(path="", what="not a JSON object", how=how, source=source),))
    return data


def _json(text: str | bytes, limits: Limits, source: str, how: str) -> Any:
    try:
        return parse_document(text, source, "json", limits).data
    except DefinitionError as exc:
        raise InputError(tuple(replace(p, how=p.how or how) for p in exc.problems)) from None


def _limits(settings: Settings) -> Limits:
    return Limits(tasks=settings.max_tasks, params_bytes=settings.max_params_bytes)


def _show(execution: Execution, *, as_json: bool) -> None:
    if as_json:
        print(to_json(execution.to_dict()))
    else:
        _console().print(execution_view(execution))


@contextmanager
def _goes_on(execution_id: str) -> Iterator[None]:
    """Say once, at once, what an interrupt does not end."""
    try:
        yield
    except KeyboardInterrupt as exc:
        if not exc.args:
            say(
                f"{execution_id} is recorded and goes on as soon as a worker runs: `pipeline status {execution_id} --watch`"
                f" follows it, `pipeline cancel {execution_id}` ends it"
            )
        raise KeyboardInterrupt(execution_id) from exc


def _console() -> Console:
    """Lines keep their length where no terminal breaks them: other programs read them."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
