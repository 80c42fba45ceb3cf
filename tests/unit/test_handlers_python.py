from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from handlers.python import call
from pipeline import ArtifactStore, Context, Fail, ParamsError, Refused


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function of a module that is on the path; `listed` is the site's setting."""
    (tmp_path / "site_calls.py").write_text(
        "def double(number): return {'double': 2 * number}\n"
        "async def later(number): return number + 1\n"
        "def odd(): return {1, 2}\n"
        "def infinite(): return float('inf')\n"
        "def broken(): raise KeyError('x')\n"
        "def typed(): raise TypeError('inside')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str, args: dict[str, Any] | None = None, *, listed: tuple[str, ...] | None = None) -> Any:
        context = Context(
            execution_id="exec-1",
            task_id="task",
            workflow_id="w",
            attempt=1,
            artifacts=ArtifactStore(root=str(tmp_path), folder="f"),
            settings={"python_calls": (name,) if listed is None else listed},
        )
        return call(name, args, context=context)

    return run


def test_call_listed_returns_the_result(calls: Any) -> None:
    assert calls("site_calls:double", {"number": 4}) == {"double": 8}
    assert calls("site_calls:later", {"number": 4}) == 5


@pytest.mark.parametrize(
    "listed", [(), ("site_calls",), ("site_calls:*",), ("site_calls:doubl",), ("site_calls:double2",)]
)
def test_call_not_listed_letter_for_letter_is_refused(calls: Any, listed: tuple[str, ...]) -> None:
    with pytest.raises(Refused, match="PIPELINE_PYTHON_CALLS"):
        calls("site_calls:double", {"number": 4}, listed=listed)


def test_call_with_no_setting_is_refused_and_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    store = ArtifactStore(root=str(tmp_path), folder="f")
    with pytest.raises(Refused):
        call(
            "explosive:x",
            context=Context(execution_id="exec-1", task_id="t", workflow_id="w", attempt=1, artifacts=store),
        )


@pytest.mark.parametrize("args", [{}, {"numbr": 1}, {"number": 1, "more": 2}])
def test_call_with_args_that_do_not_fit_names_them(calls: Any, args: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=r"number|more"):
        calls("site_calls:double", args)


@pytest.mark.parametrize("name", ["site_calls:absent", "site_calls_absent:double"])
def test_call_of_what_is_not_there_fails(calls: Any, name: str) -> None:
    with pytest.raises(Fail, match="cannot be imported"):
        calls(name)


@pytest.mark.parametrize("name", ["site_calls:odd", "site_calls:infinite"])
def test_call_that_returns_no_json_fails(calls: Any, name: str) -> None:
    with pytest.raises(Fail, match="not JSON"):
        calls(name)


@pytest.mark.parametrize(("name", "error"), [("broken", KeyError), ("typed", TypeError)])
def test_call_that_raises_passes_the_error_on(calls: Any, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        calls(f"site_calls:{name}")
