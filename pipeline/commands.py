"""What each command of the command line does; each returns whether all went well, errors are raised."""

from __future__ import annotations

import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from config.settings import Settings
from pipeline.app import Installation, import_modules, read_settings
from pipeline.compiler import compile_workflow
from pipeline.display import execution_table, execution_view, headline, task_table, watch
from pipeline.document import Document, Limits, parse_document, read_document
from pipeline.drawing import draw
from pipeline.engine import WorkflowEngine
from pipeline.errors import DefinitionError, InputError, Problem, SettingsError
from pipeline.handler import collect
from pipeline.local import Workers, flower_port_is_free, somebody_works
from pipeline.observe import Execution, summary_dict, to_json
from pipeline.pulse import Pulse
from pipeline.result_store.migrations import migrations, require_current, upgrade, version
from pipeline.states import ExecutionStatus
from pipeline.validation import json_schema
from pipeline.validation import validate as validate_definition

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


def up(arguments: Namespace) -> bool:
    """Run everything on this machine until a signal comes."""
    with Installation.open() as installation:
        require_current(installation.database_url)
        installation.dispatcher.waiting()  # without a broker nothing would ever be ready
        settings = installation.settings
        flower_on = not arguments.no_flower and flower_port_is_free(installation)
        if not flower_on and not arguments.no_flower and settings.flower_port:
            _say(f"Flower is not started: port {settings.flower_port} is taken; PIPELINE_FLOWER_PORT names another")
        concurrency = arguments.concurrency or settings.concurrency
        with Workers(
            installation, workers=arguments.workers, concurrency=concurrency, flower=flower_on, catch_signals=True
        ) as workers:
            workers.await_answers()
            if workers.alive:
                print(f"postgres {_without_password(installation.database_url)}")
                print(f"broker   {_without_password(installation.broker_url)}")
                print(f"logs     {workers.log_folder}")
                if flower_on:
                    print(f"flower   http://{settings.flower_address}:{settings.flower_port}")
                print("ready", flush=True)
            workers.join()
    return True


def worker(arguments: Namespace) -> bool:
    """Run one Celery worker."""
    with Installation.open() as installation:
        require_current(installation.database_url)
        settings = installation.settings
        installation.worker_app.worker_main([
            "worker", "--hostname", f"{arguments.name}@%h", "--pool", arguments.pool or settings.pool,
            "--concurrency", str(arguments.concurrency or settings.concurrency), "--loglevel", settings.log_level,
            "--without-gossip", "--without-mingle",
        ])  # fmt: skip
    return True


def scheduler(arguments: Namespace) -> bool:
    """Look after what was lost, until a signal comes or standard input ends."""
    stop = threading.Event()
    with suppress(KeyboardInterrupt), Installation.open() as installation:
        if arguments.beside:
            name, _, pid = arguments.beside.rpartition(":")
            pulse = Pulse(store=installation.store, name=name, pid=int(pid), lease=installation.settings.lease)
            threading.Thread(target=_set_at_eof, args=(stop,), daemon=True).start()
            threading.Thread(target=pulse.run, args=(stop,), daemon=True).start()
        else:  # beside a worker, which has looked, the database may be away for a while
            require_current(installation.database_url)
        if installation.retention is not None:
            threading.Thread(target=installation.retention.run, args=(stop,), daemon=True).start()
        installation.recovery.run(stop, installation.settings.sweep)
    return True


def _set_at_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not `sys.stdin`: its buffer's lock would be missed at the interpreter's end
        pass
    stop.set()


def flower(arguments: Namespace) -> bool:
    """Run Flower."""
    with Installation.open() as installation:
        settings = installation.settings
        auth = [f"--basic-auth={','.join(settings.flower_basic_auth)}"] if settings.flower_basic_auth else []
        installation.worker_app.start([
            "flower", f"--address={settings.flower_address}", f"--port={settings.flower_port}", "--max-tasks=20000", *auth,
        ])  # fmt: skip
    return True


def db(arguments: Namespace) -> bool:
    """Show or upgrade the schema."""
    with Installation.open() as installation:
        url, wanted = installation.database_url, migrations()[-1].version
        if arguments.action == "upgrade":
            for step in upgrade(url):
                print(f"upgraded to {step.version} ({step.name})")
        print(f"schema version {version(url)}, this code needs {wanted}")
        require_current(url)
    return True


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
        _say(execution_id)
        with _goes_on(execution_id), _workers(engine.installation):
            with _goes_on(execution_id):
                if arguments.json:
                    execution = engine.wait(execution_id, arguments.timeout)
                else:
                    execution = watch(engine, execution_id, _console(), arguments.timeout)
            _show(execution, as_json=arguments.json)
    return execution.status is ExecutionStatus.SUCCESS


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
        _say("no executions")
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


def collect_garbage(arguments: Namespace) -> bool:
    """Forget old executions now."""
    with Installation.open() as installation:
        require_current(installation.database_url)
        retention = installation.retention
        if retention is None:
            raise SettingsError("executions are kept for ever: PIPELINE_RETENTION_DAYS says for how long else")
        forgotten = 0
        while done := retention.run_once():
            forgotten += done
        print(f"{forgotten} executions forgotten")
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
    _say("no worker is running: starting one")
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
            _say(f"{execution_id} is recorded and goes on with the next worker; `pipeline cancel {execution_id}` ends it")
        raise KeyboardInterrupt(execution_id) from exc


def _console() -> Console:
    """Lines keep their length where no terminal breaks them: other programs read them."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _without_password(url: str) -> str:
    head, _, tail = url.partition("://")
    credentials, at, place = tail.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{head}://{user}{':***' if colon else ''}{at}{place}"
