"""DuckDB over data sets: every input is a view, every output a Parquet artifact, and SQL reaches nothing else.

Before any SQL of a definition runs, the connection is locked: no file but those named, no extensions, no network, no
Python variables, and no way to change that from SQL.
"""
# ruff: noqa: S608 - SQL is put together here: names are quoted, values bound, the connection locked

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import duckdb

from pipeline import ArtifactError, Context, Dataset, Fail

PARQUET: Final = "application/vnd.apache.parquet"

#: one task must not take the machine from the others of its worker; what does not fit in memory goes to a scratch folder
LIMITS: Final[dict[str, str | bool | int | float | list[str]]] = {"threads": "2", "memory_limit": "1GB"}

#: DuckDB must not fetch or load code on its own, not even for what the handlers themselves ask before the lock
CLOSED: Final[dict[str, str | bool | int | float | list[str]]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}

#: what may go well at the next try
PASSING: Final = (OSError, ArtifactError)


def quoted(name: str) -> str:
    """An identifier of DuckDB."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:
    """A text, path, truth value or number, a list of them, or a struct of them, as DuckDB writes it."""
    match value:
        case bool() | int():
            return str(value).lower()
        case Mapping():
            return "{" + ", ".join(f"{literal(str(k))}: {literal(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(literal, value)) + "]"
        case _:
            return "'" + str(value).replace("'", "''") + "'"


def datasets(inputs: Mapping[str, Any]) -> dict[str, Dataset]:
    """Those of the inputs that are data sets, by the name of their view.

    A name with '-' or '.' gets a second one with '_', which needs no quotes.
    """
    found = {
        name: Dataset.model_validate(value)
        for name, value in inputs.items()
        if isinstance(value, Dataset) or (isinstance(value, Mapping) and value.keys() >= Dataset.model_fields.keys())
    }
    plain = {name.replace("-", "_").replace(".", "_"): data for name, data in found.items()}
    return {**plain, **found}


@contextmanager
def connected(
    context: Context, data: Mapping[str, Dataset], files: Iterable[Path] = ()
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A locked DuckDB connection with a view of each data set; `files` are what it may read and write besides.

    Raises:
        Fail: DuckDB refuses what is asked of it.
        ArtifactError: a data set is not there, or the disk or the memory does not suffice.
    """
    with ExitStack() as stack:
        stack.enter_context(explained())
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="duckdb-"))
        paths = {name: stack.enter_context(context.artifacts.read(found.uri)) for name, found in data.items()}
        config = {**LIMITS, **CLOSED, "temp_directory": scratch}
        connection = stack.enter_context(duckdb.connect(":memory:", config=config))
        connection.execute("SET TimeZone = 'UTC'")
        for name, path in paths.items():
            connection.execute(f"CREATE VIEW {quoted(name)} AS FROM read_parquet({literal(path)})")
        connection.execute(f"SET allowed_paths = {literal([*paths.values(), *files])}")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


@contextmanager
def explained() -> Iterator[None]:
    """Turns what DuckDB raises into errors of a task: mistakes fail at once, a full disk or memory may pass."""
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as exc:
        raise ArtifactError(str(exc)) from exc
    except duckdb.PermissionException as exc:
        raise Fail(f"{exc}\nSQL sees the data sets that its task is given and no other file") from exc
    except duckdb.Error as exc:
        raise Fail(str(exc)) from exc


def select(connection: duckdb.DuckDBPyConnection, sql: str, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The one SELECT that the text holds, ready to stand in brackets, and those of the parameters that it names."""
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise Fail("sql must be one SELECT statement: its rows are the task's result")
    names = statements[0].named_parameters
    if missing := sorted(names - params.keys()):
        raise Fail(f"sql uses ${', $'.join(missing)}, which params does not give")
    raw = sql.encode()  # the tokenizer counts bytes
    operators = (place for place, kind in duckdb.tokenize(sql) if kind == duckdb.token_type.operator)
    end = next((place for place in operators if raw[place : place + 1] == b";"), None)
    return raw[:end].decode(), {name: params[name] for name in names}


def save(
    context: Context, sql: str, data: Mapping[str, Dataset], params: Mapping[str, Any], files: Iterable[Path] = ()
) -> Dataset:
    """Run one SELECT and keep its rows as a data set of this attempt."""
    with (
        context.artifacts.write("data.parquet", PARQUET) as writing,
        connected(context, data, [*files, writing.path]) as connection,
    ):
        text, bound = select(connection, sql, params)
        stored, columns = _storable(connection, text, bound)
        copy = f"COPY ({stored}\n) TO {literal(writing.path)} (FORMAT parquet, COMPRESSION zstd)"
        written = connection.execute(copy, bound).fetchone()
    return writing.dataset(rows=written[0] if written else 0, columns=columns)


def _storable(connection: duckdb.DuckDBPyConnection, sql: str, bound: dict[str, Any]) -> tuple[str, list[str]]:
    """The SELECT and its columns; integers of 128 bits, as sum() gives, become decimals: Parquet would round them."""
    kinds = [(str(row[0]), str(row[1])) for row in connection.execute(f"DESCRIBE ({sql}\n)", bound).fetchall()]
    counted = Counter(name.lower() for name, _ in kinds)
    if twice := [name for name, _ in kinds if counted[name.lower()] > 1]:
        raise Fail(f"sql gives more than one column the name {', '.join(twice)}; name them apart with AS")
    wide = [quoted(name) for name, kind in kinds if kind in ("HUGEINT", "UHUGEINT")]
    casts = ", ".join(f"CAST({name} AS DECIMAL(38, 0)) AS {name}" for name in wide)
    stored = f"SELECT * REPLACE ({casts}) FROM ({sql}\n)" if wide else sql
    return stored, [name for name, _ in kinds]
