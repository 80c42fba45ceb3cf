"""What `from pipeline import ...` gives: pinned, for others build on it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import pipeline

PUBLIC = [
    "Artifact", "ArtifactError", "ArtifactStore", "AttemptLost", "Context", "Dataset", "DefinitionError", "Execution",
    "ExecutionNotFound", "ExecutionStatus", "Fail", "InputError", "ParamsError", "PipelineError", "Refused", "Retry",
    "RetryPolicy", "Skip", "TaskDefinition", "TaskError", "TaskExecution", "TaskStatus", "WaitTimeout",
    "WorkflowBuilder", "WorkflowDefinition", "WorkflowEngine", "handler",
]  # fmt: skip


def test_public_names_are_these_in_order() -> None:
    assert pipeline.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(pipeline, name)
    said = inspect.getdoc(value)
    assert said
    assert not said.startswith(f"{name}("), "a generated signature explains nothing"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_explained(name: str) -> None:
    value = getattr(pipeline, name)
    if not inspect.isclass(value):
        return
    fields = getattr(value, "__dataclass_fields__", {})
    own = {n: v for n, v in vars(value).items() if not n.startswith(("_", "model_")) and n not in fields}
    assert [n for n, v in own.items() if (callable(v) or isinstance(v, property)) and not inspect.getdoc(v)] == []


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("execute_workflow", ["workflow_def", "input_data", "user_id", "idempotency_key", "connection"]),
        ("execute_many", ["workflow_def", "inputs", "user_id", "idempotency_keys", "connection"]),
        ("wait", ["execution_id", "timeout"]),
        ("get_execution", ["execution_id"]),
        ("cancel", ["execution_id", "user_id"]),
        ("pause", ["execution_id", "user_id"]),
        ("resume", ["execution_id", "user_id"]),
        ("retry", ["execution_id", "user_id"]),
        ("close", []),
    ],
)
def test_engine_takes_what_the_contract_names(method: str, parameters: list[str]) -> None:
    given = list(inspect.signature(getattr(pipeline.WorkflowEngine, method)).parameters)[1:]
    assert given[: len(parameters)] == parameters


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = pipeline.nothing_of_ours  # type: ignore[attr-defined]


def test_importing_the_package_imports_no_handler_and_starts_nothing() -> None:
    code = (
        "import sys, threading, pipeline;"
        "print([m for m in sys.modules if m.split('.')[0] in ('handlers', 'duckdb', 'flower', 'vl_convert')],"
        " threading.active_count())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout == "[] 1\n"
