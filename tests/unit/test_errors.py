"""The tree of errors: as drawn, whole after a journey between processes, and said in words that help."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator

import pytest

from pipeline import errors
from pipeline.errors import DefinitionError, PipelineError, Problem, WaitTimeout
from pipeline.handler import AttemptLost

#: arguments of every constructor that asks for some
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "DefinitionError": ((Problem(path="tasks[0]", what="wrong", how="mend it", source="a.yaml", line=3),),),
    "InputError": ((Problem(path="n", what="missing"),),),
    "DefinitionConflict": ("orders", "2"),
    "IdempotencyConflict": ("key", "exec-1"),
    "HandlerImportError": ("my.handlers", "SyntaxError"),
    "WorkflowNotFound": ("orders", "2"),
    "ExecutionNotFound": ("exec-1",),
    "TaskNotFound": ("exec-1", "clean"),
    "IllegalTransition": ("exec-1", "cancel", "success"),
    "WaitTimeout": ("exec-1", 1.5),
    "Retry": ("later", 3.0),
    "Skip": ("nothing to do",),
}


def tree(root: type[BaseException]) -> Iterator[type[BaseException]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


ALL = list(dict.fromkeys(tree(PipelineError)))


def drawn() -> dict[str, str]:
    """Parents by name, as the drawing in the module's docstring has them."""
    parents, path = {}, ["PipelineError"]
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"((?:[│ ]   )*)[├└]── (\w+)", line)
        if found:
            depth = len(found[1]) // 4 + 1
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1]
    return parents


def test_drawing_is_the_tree() -> None:
    assert drawn() == {kind.__name__: kind.__bases__[0].__name__ for kind in ALL if kind is not PipelineError}
    defined = {n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, BaseException)}
    assert defined == {kind.__name__ for kind in ALL}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_error_has_a_docstring_and_survives_pickling(kind: type[PipelineError]) -> None:
    assert kind.__doc__
    error = kind(*ARGUMENTS.get(kind.__name__, ("what happened",)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert str(error).strip()


def test_attempt_lost_survives_pickling_and_is_no_error_of_the_tree() -> None:
    again = pickle.loads(pickle.dumps(AttemptLost("gone")))
    assert (type(again), str(again)) == (AttemptLost, "gone")
    assert not issubclass(AttemptLost, PipelineError)


def test_wait_timeout_is_a_timeout_error() -> None:
    assert issubclass(WaitTimeout, TimeoutError)
    assert str(WaitTimeout("exec-1", 1.5)) == "execution exec-1 had not ended after 1.5 s; look at its status, or wait again"


def test_definition_error_has_a_line_for_each_problem() -> None:
    problems = (
        Problem(path="tasks[0].id", what="is missing", how="write one", source="a.yaml", line=3),
        Problem(path="", what="no tasks", source="<dict>"),
        Problem(path="x", what="odd"),
    )
    assert str(DefinitionError(problems)).splitlines() == [
        "a.yaml:3: tasks[0].id: is missing; write one", "<dict>: no tasks", "x: odd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mend"),
    [
        ("DefinitionConflict", "give the changed definition a new version"),
        ("IdempotencyConflict", "use a new key"),
        ("HandlerImportError", "PIPELINE_HANDLERS"),
        ("WorkflowNotFound", "pipeline register"),
        ("ExecutionNotFound", "pipeline list"),
        ("TaskNotFound", "pipeline status"),
    ],
)
def test_message_says_how_to_mend_it(kind: str, mend: str) -> None:
    error = getattr(errors, kind)(*ARGUMENTS[kind])
    assert mend in str(error)
    assert all(str(argument) in str(error) for argument in ARGUMENTS[kind])
