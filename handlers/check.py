"""Expectations about a data set: all are looked at, and what does not hold is shown."""
# ruff: noqa: S608 - SQL is put together here: names are quoted, values bound, the connection locked

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import duckdb
from pydantic import BaseModel, ConfigDict, Field

from handlers import tables
from handlers.sql import as_json
from pipeline import Context, Dataset, Fail, handler

Value = bool | int | float | str

#: characters of one row in a message: a table must not end up in an error
WIDTH = 400


class Bounds(BaseModel):
    """The smallest and the largest value that is right; a bound that is not given does not bind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int | float | str | None = None
    max: int | float | str | None = None


class Checked(Dataset):
    """The data set, once everything that is expected of it holds."""

    #: how many expectations were looked at
    checks: int
    #: each by name
    passed: tuple[str, ...]


class _Expectations:
    """Looks at one expectation after another and keeps what each found."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, columns: Sequence[str], sample: int) -> None:
        self._connection, self._columns, self._sample = connection, columns, sample
        self.passed: list[str] = []
        self.failed: list[str] = []

    def holds(self, name: str, right: bool, found: str) -> None:
        """A fact that is right or wrong."""
        if right:
            self.passed.append(name)
        else:
            self.failed.append(f"{name}: {found}")

    def no_rows(self, name: str, sql: str, params: Mapping[str, Any], *, columns: Sequence[str] = ()) -> None:
        """A query that finds the offending rows; `columns` are what it needs of the data set."""
        if missing := [column for column in columns if column not in self._columns]:
            self.holds(name, False, f"there is no column {', '.join(missing)}; there are {', '.join(self._columns)}")
            return
        try:
            text, bound = tables.select(self._connection, sql, params)
            counted = self._connection.execute(f"SELECT count(*) FROM ({text}\n)", bound).fetchone()
            count = counted[0] if counted else 0
            rows = self._shown(text, bound) if count and self._sample else []
        except (duckdb.Error, Fail) as exc:
            if isinstance(exc, (duckdb.IOException, duckdb.OutOfMemoryException)):
                raise
            self.holds(name, False, str(exc))
            return
        shown = "".join(f"\n    {row}" for row in rows)
        self.holds(name, count == 0, f"{count} {'row' if count == 1 else 'rows'}" + (f", as:{shown}" if shown else ""))

    def _shown(self, text: str, bound: Mapping[str, Any]) -> list[str]:
        found = self._connection.execute(f"SELECT * FROM ({text}\n) LIMIT {self._sample}", dict(bound))
        names = [column[0] for column in found.description or ()]
        rows = (
            ", ".join(f"{name}={as_json(value)}" for name, value in zip(names, row, strict=True))
            for row in found.fetchall()
        )
        return [row if len(row) <= WIDTH else row[: WIDTH - 3] + "..." for row in rows]


@handler("check.expect", retry_on=tables.PASSING)
def expect(
    data: Dataset,
    rows: Bounds | None = None,
    not_null: Sequence[str] = (),
    unique: Sequence[str | Sequence[str]] = (),
    ranges: Mapping[str, Bounds] | None = None,
    values: Mapping[str, Sequence[Value]] | None = None,
    sql: Mapping[str, str] | None = None,
    sample: Annotated[int, Field(ge=0, le=100)] = 5,
    *,
    context: Context,
    **inputs: Any,
) -> Checked:
    """Hold a data set against what is expected of it, and hand it on.

    Where anything does not hold, the task fails at once, and its error names every expectation that failed, each with
    the number of offending rows and some of them. NULL is within every range and among all values.

    Args:
        rows: bounds of the number of rows.
        not_null: columns without NULL.
        unique: columns, or lists of columns, whose values stand in one row only; NULL counts as a value.
        ranges: bounds by column.
        values: allowed values by column.
        sql: by name, a SELECT that must find no rows; the data set is the table `data`, further inputs that are data
            sets are tables of their names.
        sample: offending rows to show of each.
    """
    views = {**tables.datasets(inputs), "data": data}
    with tables.connected(context, views) as connection:
        look = _Expectations(connection, data.columns, sample)
        if rows is not None:
            found = connection.execute("SELECT count(*) FROM data").fetchone()
            count = found[0] if found else 0
            look.holds(f"rows {_span(rows)}", _within(count, rows), f"there are {count}")
        for column in not_null:
            sought = f"FROM data WHERE {tables.quoted(column)} IS NULL"
            look.no_rows(f"not_null {column}", sought, {}, columns=[column])
        for item in unique:
            names = [item] if isinstance(item, str) else list(item)
            group = ", ".join(map(tables.quoted, names))
            sought = f"SELECT {group}, count(*) AS times FROM data GROUP BY {group} HAVING count(*) > 1"
            look.no_rows(f"unique {', '.join(names)}", sought, {}, columns=names)
        for column, bounds in (ranges or {}).items():
            sought, params = _outside(column, bounds)
            look.no_rows(f"range {column} {_span(bounds)}", sought, params, columns=[column])
        for column, allowed in (values or {}).items():
            sought, params = _not_among(column, allowed)
            look.no_rows(f"values {column}", sought, params, columns=[column])
        for name, text in (sql or {}).items():
            look.no_rows(f"sql {name}", text, {})
    total = len(look.passed) + len(look.failed)
    if look.failed:
        raise Fail(f"{len(look.failed)} of {total} expectations failed\n- " + "\n- ".join(look.failed))
    return Checked(**data.model_dump(include=set(Dataset.model_fields)), checks=total, passed=tuple(look.passed))


def _within(count: int, bounds: Bounds) -> bool:
    return (bounds.min is None or count >= float(bounds.min)) and (bounds.max is None or count <= float(bounds.max))


def _span(bounds: Bounds) -> str:
    return f"{'' if bounds.min is None else bounds.min}..{'' if bounds.max is None else bounds.max}"


def _outside(column: str, bounds: Bounds) -> tuple[str, dict[str, Any]]:
    params = {name: value for name, value in (("min", bounds.min), ("max", bounds.max)) if value is not None}
    signs = {"min": "<", "max": ">"}
    tests = (f"{tables.quoted(column)} {signs[name]} ${name}" for name in params)
    return f"FROM data WHERE {' OR '.join(tests) or 'false'}", params


def _not_among(column: str, allowed: Sequence[Value]) -> tuple[str, dict[str, Any]]:
    params = {f"v{place}": value for place, value in enumerate(allowed)}
    listed = ", ".join(f"${name}" for name in params)
    test = f"{tables.quoted(column)} NOT IN ({listed})" if listed else f"{tables.quoted(column)} IS NOT NULL"
    return f"FROM data WHERE {test}", params
