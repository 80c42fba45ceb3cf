"""The door for people: thin over the engine; what it prints on stdout is for machines where `--json` asks for it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from types import FrameType

from rich.console import Console

from pipeline import commands, processes
from pipeline.errors import NotFound, PipelineError, ServiceUnavailable, WaitTimeout
from pipeline.states import ExecutionStatus


class Exit(IntEnum):
    """Exit codes; scripts rely on them."""

    DONE = 0
    FAILED = 1  # the execution failed or was cancelled
    INVALID = 2  # a definition, an input, a setting or the usage is wrong
    NOT_FOUND = 3
    UNAVAILABLE = 4  # a service cannot be reached
    TIMED_OUT = 124  # the wait ended before the execution did
    INTERRUPTED = 130  # Ctrl-C


EXAMPLES = """\
examples:
  pipeline demo                                      a workflow on real data, with nothing set up
  pipeline validate flows/*.yaml                     every problem, with its line
  pipeline compile flow.yaml                         its groups and chords
  pipeline compile flow.yaml --format svg > flow.svg
  pipeline up --workers 2 --concurrency 4            services, workers and Flower on this machine
  pipeline run flow.yaml --input '{"day": "monday"}'
  pipeline run orders@3 --input @input.json --user ana --json
  pipeline status exec-0123456789ab --watch
  pipeline list --status failed
  pipeline retry exec-0123456789ab                   what succeeded is kept
  pipeline rerun exec-0123456789ab clean --params '{"min": 5}'
  pipeline mark exec-0123456789ab load skipped --reason "loaded by hand" --user ana
  celery -A pipeline worker                          Celery's own commands work too

exit codes: 0 done, 1 the execution failed or was cancelled, 2 invalid definition or usage, 3 not found,
            4 a service cannot be reached, 124 the wait timed out, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="pipeline", description="Data workflows on Celery, recorded in Postgres.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def verb(name: str, run: commands.Command, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    verb("demo", commands.demo, "run the main job on real data: New York's flights of 2013")

    up = verb("up", processes.up, "run services, workers and Flower on this machine until Ctrl-C")
    up.add_argument("--workers", type=_count, default=1, metavar="N", help="worker processes (default 1)")
    up.add_argument("--concurrency", type=_count, metavar="N", help="tasks that each runs at a time (default 2)")
    up.add_argument("--no-flower", action="store_true", help="do not start Flower")

    worker = verb("worker", processes.worker, "run one worker")
    worker.add_argument("--name", default=f"worker-{os.getpid()}", help="node name, before the @ (default worker-<pid>)")
    worker.add_argument("--concurrency", type=_count, metavar="N", help="tasks that it runs at a time")
    worker.add_argument("--pool", choices=("prefork", "threads", "solo"), help="Celery pool (default prefork)")

    scheduler = verb("scheduler", processes.scheduler, "run recovery: publish what was lost, retry what is due")
    scheduler.add_argument("--beside", metavar="NAME:PID", help="keep a worker's leases too; end with standard input")

    verb("flower", processes.flower, "run Flower on this installation's broker")

    db = verb("db", processes.db, "show or upgrade the database's schema")
    db.add_argument("action", choices=("upgrade", "status"))

    validate = verb("validate", commands.validate, "report every problem of definitions")
    validate.add_argument("files", nargs="+", metavar="FILE")

    draw = verb("compile", commands.compile_, "show the groups and chords that a definition compiles to")
    draw.add_argument("file", metavar="FILE")
    draw.add_argument("--format", choices=("text", "json", "mermaid", "svg"), default="text")

    verb("schema", commands.schema, "print the JSON Schema of definitions, for editors")
    verb("handlers", commands.handlers, "list the handlers of this installation with their parameters")

    register = verb("register", commands.register, "record definitions, so that they can be run by their ids")
    register.add_argument("files", nargs="+", metavar="FILE")

    run = verb("run", commands.run, "run a workflow and wait for it; starts what is missing and ends it after")
    run.add_argument("workflow", metavar="FILE|ID[@VERSION]")
    run.add_argument("--input", default="{}", metavar="JSON|@FILE", help="the execution's input, a JSON object")
    run.add_argument("--user", metavar="U", help="recorded as the one who enqueued it")
    run.add_argument("--idempotency-key", metavar="K", help="a repeat with the same key finds the same execution")
    run.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give up waiting after so long")
    run.add_argument("--no-wait", action="store_true", help="enqueue, print the execution's id and leave")
    run.add_argument("--json", action="store_true", help="print one JSON document")

    status = verb("status", commands.status, "show an execution with its tasks")
    status.add_argument("execution", metavar="EXECUTION")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON document")
    how.add_argument("--watch", action="store_true", help="follow it until it ends")

    listed = verb("list", commands.list_, "list the newest executions")
    listed.add_argument("--status", choices=[s.value for s in ExecutionStatus])
    listed.add_argument("--limit", type=_count, default=20, metavar="N")
    listed.add_argument("--json", action="store_true", help="print one JSON document")

    for name, text in (
        ("cancel", "start nothing more of an execution and stop what runs"),
        ("pause", "start nothing more of an execution; what runs goes on"),
        ("resume", "undo pause"),
        ("retry", "run a failed or cancelled execution again from what did not succeed"),
    ):
        steer = verb(name, commands.steer, text)
        steer.add_argument("execution", metavar="EXECUTION")
        steer.add_argument("--user", metavar="U", help="recorded as the one who did it")

    rerun = verb("rerun", commands.rerun, "run an ended execution again from a task, with everything downstream of it")
    rerun.add_argument("execution", metavar="EXECUTION")
    rerun.add_argument("task", metavar="TASK")
    rerun.add_argument("--params", metavar="JSON|@FILE", help="used instead of all of the definition's for this task; the input goes before them")
    rerun.add_argument("--user", metavar="U", help="recorded as the one who did it")

    mark = verb("mark", commands.mark, "decide a task by hand; a failed execution goes on from there")
    mark.add_argument("execution", metavar="EXECUTION")
    mark.add_argument("task", metavar="TASK")
    mark.add_argument("status", choices=("success", "skipped"))
    mark.add_argument("--reason", required=True, help="recorded, for those who wonder later")
    mark.add_argument("--result", default="null", metavar="JSON", help="recorded as the task's result")
    mark.add_argument("--user", metavar="U", help="recorded as the one who did it")

    verb("gc", processes.collect_garbage, "forget executions that ended more than PIPELINE_RETENTION_DAYS ago")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = sys.argv[1:] if argv is None else argv
    if not all(_is_text(argument) for argument in given):
        parser().error("arguments must be UTF-8 text")
    arguments = parser().parse_args(given)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # handlers beside the definitions
    signal.signal(signal.SIGTERM, _terminated)  # what was started is ended; workers and Flower have their own ways
    errors = Console(stderr=True)
    try:
        succeeded = arguments.run(arguments)
    except KeyboardInterrupt:
        errors.print("interrupted", style="yellow")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except PipelineError as exc:
        errors.print(str(exc), style="red", markup=False, highlight=False, soft_wrap=True)
        return _exit_code(exc)
    return Exit.DONE if succeeded else Exit.FAILED


def _exit_code(exc: PipelineError) -> Exit:
    match exc:
        case WaitTimeout():
            return Exit.TIMED_OUT
        case NotFound():
            return Exit.NOT_FOUND
        case ServiceUnavailable():
            return Exit.UNAVAILABLE
        case _:
            return Exit.INVALID


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _is_text(argument: str) -> bool:
    """False for bytes that the shell handed on and no database can hold."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value
