"""Data workflows on Celery, recorded in Postgres. The map, in the order of the flow:

DEFINE     definition  builder  document      what is declared: in Python, YAML, JSON or dicts
VALIDATE   validation  contents  problems  templates  graph  catalogue  submission
                                              every problem at once, with place and mend
COMPILE    compiler  drawing  picture         groups and chords, and how they look
DISPATCH   dispatch  redis_transport          record an execution, publish what is ready
EXECUTE    handler  execution  turn  payload  artifacts  redaction
                                              the Celery task around every handler, several of them in a row
           attendance  attendant  worker  pulse
                                              what stands beside it: stops it, keeps its lease, hands it back
RECORD     result_store  result_backend       Postgres is the truth; Celery's view of it
RECOVER    recovery  retention  beat          publish what was lost, take tasks from lost workers, forget what is old
OBSERVE    observe  display  events           read-only views, how a terminal shows them, and Celery's events

Across the stages: states and errors. On top: engine (the door for programs), cli, commands and processes (the door
for people), app (the composition root), local, stack, embedded and servers (the processes of one machine). Beside it: testing, the
crash kit, which breaks all this from outside.
"""

from __future__ import annotations

from typing import Any

from pipeline.app import Installation
from pipeline.artifacts import Artifact, ArtifactStore, Dataset
from pipeline.builder import WorkflowBuilder
from pipeline.definition import RetryPolicy, TaskDefinition, WorkflowDefinition
from pipeline.engine import WorkflowEngine
from pipeline.errors import (
    ArtifactError,
    DefinitionError,
    ExecutionNotFound,
    Fail,
    InputError,
    ParamsError,
    PipelineError,
    Refused,
    Retry,
    Skip,
    TaskError,
    WaitTimeout,
)
from pipeline.handler import AttemptLost, Context, handler
from pipeline.observe import Execution
from pipeline.result_store.rows import TaskExecution
from pipeline.states import ExecutionStatus, TaskStatus

__all__ = [
    "Artifact",
    "ArtifactError",
    "ArtifactStore",
    "AttemptLost",
    "Context",
    "Dataset",
    "DefinitionError",
    "Execution",
    "ExecutionNotFound",
    "ExecutionStatus",
    "Fail",
    "InputError",
    "ParamsError",
    "PipelineError",
    "Refused",
    "Retry",
    "RetryPolicy",
    "Skip",
    "TaskDefinition",
    "TaskError",
    "TaskExecution",
    "TaskStatus",
    "WaitTimeout",
    "WorkflowBuilder",
    "WorkflowDefinition",
    "WorkflowEngine",
    "handler",
]


def __getattr__(name: str) -> Any:
    """`celery -A pipeline` looks for `celery`: the app of this process's installation, made when it is asked for."""
    if name == "celery":
        installation = Installation.open()
        globals()["celery"] = installation.worker_app
        return globals()["celery"]
    raise AttributeError(name)
