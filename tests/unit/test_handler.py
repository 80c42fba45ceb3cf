"""How a function becomes a handler: its name, what it takes, and what is refused at once."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pipeline import Artifact, ArtifactStore, Context, Dataset, handler
from pipeline.errors import HandlerImportError
from pipeline.handler import Handler, collect

DATA = {"uri": "file:///d.parquet", "format": "parquet", "rows": 2, "columns": ["a"], "bytes": 9, "sha256": "0" * 64}


class Order(BaseModel):
    """A user's own model."""

    number: int


@handler("t.clean", retry_on=(OSError,), never_retry_on=(KeyError,), timeout=120)
def clean(flights: Dataset, min_flights: int = 100, *, context: Context) -> dict[str, Any]:
    """Clean the flights.

    At length.
    """
    return {"uri": flights.uri, "min": min_flights, "task": context.task_id}


@handler("t.anything")
async def anything(**merged: Any) -> dict[str, Any]:
    return merged


@handler("t.odd")
def odd(json: list[Order], copy: Any, model_config: str = "", *rest: int) -> None:
    """Names that a pydantic model could not have."""


class Strange:
    """A type that has no JSON Schema."""


@handler("t.strange")
def strange(thing: Strange) -> None: ...


def module(**members: Any) -> ModuleType:
    made = ModuleType("their.module")
    vars(made).update(members)
    return made


def declared(function: Any) -> Handler:
    return next(iter(collect([module(f=function)]).values()))


def context() -> Context:
    return Context(
        execution_id="exec-1", task_id="clean", workflow_id="w", attempt=1, artifacts=ArtifactStore(root="/x", folder="y")
    )


def test_decorated_function_stays_the_function() -> None:
    data = Dataset.model_validate(DATA)
    assert clean(data, context=context()) == {"uri": data.uri, "min": 100, "task": "clean"}
    assert clean.__name__ == "clean"


def test_declaration_keeps_name_and_options() -> None:
    found = declared(clean)
    assert (found.name, found.retry_on, found.never_retry_on, found.timeout) == ("t.clean", (OSError,), (KeyError,), 120)
    plain = declared(anything)
    assert (plain.retry_on, plain.never_retry_on, plain.timeout) == (None, (), None)


def test_spec_describes_parameters_without_the_context() -> None:
    spec = declared(clean).spec
    assert (spec.name, spec.summary, spec.open_ended) == ("t.clean", "Clean the flights.", False)
    assert [(p.name, p.required) for p in spec.parameters] == [("flights", True), ("min_flights", False)]
    assert spec.parameters[1].schema == {"type": "integer"}
    assert "uri" in spec.parameters[0].schema["properties"]
    assert declared(clean).context_parameter == "context"


def test_spec_of_kwargs_is_open_ended_and_of_strange_types_is_empty() -> None:
    spec = declared(anything).spec
    assert (spec.parameters, spec.open_ended, spec.summary) == ((), True, "")
    assert declared(strange).spec.parameters[0].schema == {}


def test_input_is_checked_converted_and_bound_by_name_and_the_rest_is_dropped() -> None:
    arguments = declared(clean).input_adapter.validate_python({"flights": DATA, "other": 1})
    assert arguments == {"flights": Dataset.model_validate(DATA)}
    arguments = declared(odd).input_adapter.validate_python({"json": [{"number": "7"}], "copy": None, "model_config": "x"})
    assert arguments == {"json": [Order(number=7)], "copy": None, "model_config": "x"}


def test_open_ended_input_keeps_every_name() -> None:
    merged = {"a": 1, "with-dash": [2]}
    assert declared(anything).input_adapter.validate_python(merged) == merged


@pytest.mark.parametrize(
    ("merged", "place"),
    [({}, "flights"), ({"flights": {"uri": "x"}}, "flights.rows"), ({"flights": DATA, "min_flights": "many"}, "min_flights")],
)
def test_input_that_does_not_fit_is_refused_with_its_place(merged: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as refused:
        declared(clean).input_adapter.validate_python(merged)
    assert place in [".".join(map(str, error["loc"])) for error in refused.value.errors()]


def test_collect_finds_handlers_once_however_often_they_are_imported_and_nothing_else() -> None:
    found = collect([module(a=clean, b=clean, c=len, d=3), module(again=clean, other=anything)])
    assert sorted(found) == ["t.anything", "t.clean"]


def test_collect_refuses_two_functions_of_one_name() -> None:
    @handler("t.clean")
    def rival() -> None: ...

    with pytest.raises(HandlerImportError, match=r"'t\.clean' is declared by .*clean too"):
        collect([module(a=clean), module(b=rival)])


def test_collect_refuses_a_signature_that_cannot_be_read() -> None:
    @handler("t.unread")
    def unread(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(HandlerImportError, match=r"signature of 't\.unread': .*Nowhere"):
        collect([module(a=unread)])


def test_context_bounds_progress_and_names_the_task_for_others() -> None:
    told: list[tuple[float, str]] = []
    mine = Context(**{**vars(context()), "report": lambda percent, message: told.append((percent, message))})
    for percent in (-5, 42, 1000):
        mine.progress(percent, "at work")
    assert told == [(0.0, "at work"), (42, "at work"), (100.0, "at work")]
    assert mine.idempotency_key == "exec-1_clean"
    assert mine.logger.extra == {"execution_id": "exec-1", "task_id": "clean", "attempt": 1}
    assert not mine.cancelled
    mine.heartbeat()


def test_artifact_and_dataset_bind_from_the_json_that_results_are() -> None:
    data = Dataset.model_validate(DATA)
    assert Dataset.model_validate(data.model_dump(mode="json")) == data
    artifact = Artifact(uri="file:///x", bytes=1, sha256="0" * 64)
    assert Artifact.model_validate(artifact.model_dump(mode="json")) == artifact


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: handler(len), "write @handler"),
        (lambda: handler("x.y", timeout="5m"), "timeout is a number of seconds above 0, not '5m'"),
        (lambda: handler("x.y", timeout=0), "above 0"),
        (lambda: handler("x.y", retry_on=OSError), r"retry_on is a list of exceptions: write \[OSError\]"),
        (lambda: handler("x.y", never_retry_on=ValueError), r"write \[ValueError\]"),
    ],
)
def test_declaration_with_an_argument_of_the_wrong_kind_is_refused_where_it_stands(declare: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        declare()
