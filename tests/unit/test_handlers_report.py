from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import pytest
from pydantic import ValidationError

from handlers.report import Chart, Section, report
from pipeline import Artifact, ArtifactError, ArtifactStore, Context, Dataset, Fail

Make = Callable[[str], Dataset]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    store = ArtifactStore(root=str(tmp_path), folder="exec-1/report/1")
    return Context(execution_id="exec-1", task_id="report", workflow_id="flights", attempt=1, artifacts=store)


@pytest.fixture
def make(context: Context) -> Make:
    def dataset(sql: str) -> Dataset:
        with context.artifacts.write("data.parquet") as writing, duckdb.connect() as connection:
            connection.execute(f"COPY ({sql}) TO '{writing.path}' (FORMAT parquet)")
            relation = connection.sql(f"SELECT * FROM '{writing.path}'")
            rows, columns = len(relation), relation.columns
        return writing.dataset(rows=rows, columns=columns)

    return dataset


class Elements(HTMLParser):
    """The elements of a page, in order, each with its attributes and text; raises where they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "img"):
            self.open.append((tag, self.found[-1][2]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1][1].append(data)

    def texts(self, *tags: str) -> list[str]:
        return ["".join(text) for tag, _, text in self.found if tag in tags]


def written(context: Context, title: str, *sections: Section) -> str:
    artifact = report(title, list(sections), context=context)
    assert artifact.media_type == "text/html"
    with context.artifacts.read(artifact.uri) as path:
        return path.read_text(encoding="utf-8")


def picture(context: Context, content: bytes = PNG) -> Artifact:
    with context.artifacts.write("chart.png", "image/png") as writing:
        writing.path.write_bytes(content)
    assert writing.artifact is not None
    return writing.artifact


def test_report_has_title_origin_headings_and_paragraphs(context: Context) -> None:
    text = "One.\n\nTwo,\nstill two.\r\n\r\n\n\nThree."
    page = Elements(written(context, "Delays", Section(heading="A", text=text), Section(heading="B")))
    assert page.texts("title", "h1", "h2") == ["Delays", "Delays", "A", "B"]
    assert page.texts("p") == ["flights · exec-1", "One.", "Two,\nstill two.", "Three."]


def test_report_shows_the_first_rows_and_says_of_how_many(context: Context, make: Make) -> None:
    data = make("SELECT range AS n, 'name ' || range AS name FROM range(16000)")
    page = Elements(written(context, "T", Section(heading="A", table=data)))
    assert page.texts("th") == ["n", "name"]
    assert page.texts("td")[:4] == ["0", "name 0", "1", "name 1"]
    assert len(page.texts("tr")) == 21
    assert page.texts("p")[-1] == "20 of 16,000 rows"


@pytest.mark.parametrize(("count", "says"), [(0, "0 rows"), (1, "1 row"), (3, "3 rows"), (4, "3 of 4 rows")])
def test_report_short_table_is_shown_whole(context: Context, make: Make, count: int, says: str) -> None:
    data = make(f"SELECT range AS n FROM range({count})")
    page = Elements(written(context, "T", Section(heading="A", table=data, rows=3)))
    assert page.texts("p")[-1] == says
    assert page.texts("th") == ["n"]


def test_report_cells_are_written_for_readers(context: Context, make: Make) -> None:
    data = make(
        "SELECT 1234567 AS i, 3.14159::DOUBLE AS f, 0.00012345::DOUBLE AS s, 'nan'::DOUBLE AS q, 1.50::DECIMAL(5,2) AS d,"
        " NULL::INTEGER AS n, TRUE AS b, DATE '2013-01-02' AS day, TIMESTAMP '2013-01-02 03:04:05.678' AS t,"
        " repeat('x', 1000) AS long, [1, 2] AS l"
    )
    page = Elements(written(context, "T", Section(heading="A", table=data)))
    cells = page.texts("td")
    assert cells[:9] == [
        "1234567", "3.14", "0.000123", "nan", "1.50", "–", "True", "2013-01-02", "2013-01-02 03:04:05",
    ]  # fmt: skip
    assert cells[9:] == ["x" * 299 + "…", "[1, 2]"]
    numeric = [attributes.get("class") == "number" for tag, attributes, _ in page.found if tag == "th"]
    assert numeric == [True] * 5 + [False] * 6


def test_report_chart_is_inside_the_file(context: Context) -> None:
    text = written(context, "T", Section(heading="A", chart=Chart(png=picture(context), title='The "chart"')))
    (image,) = (attributes for tag, attributes, _ in Elements(text).found if tag == "img")
    assert image["alt"] == 'The "chart"'
    assert image["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode()


def test_report_takes_the_result_of_a_plot(context: Context) -> None:
    png = picture(context).model_dump()
    section = Section.model_validate({"heading": "A", "chart": {"png": png, "html": png, "title": "t"}})
    assert written(context, "T", section).count("<img ") == 1


def test_report_picture_that_is_no_png_fails(context: Context) -> None:
    svg = picture(context, b"<svg onload='alert(1)'/>")
    with pytest.raises(Fail, match="no PNG"):
        report("T", [Section(heading="A", chart=Chart(png=svg))], context=context)


def test_report_picture_outside_the_artifacts_is_an_error(context: Context, tmp_path: Path) -> None:
    outside = Artifact(uri="file:///etc/passwd", bytes=1, sha256="0")
    with pytest.raises(ArtifactError):
        report("T", [Section(heading="A", chart=Chart(png=outside))], context=context)


def test_report_escapes_every_value(context: Context, make: Make) -> None:
    evil = "<script>alert(1)</script>\"'&lt;"
    quoted = evil.replace("'", "''")
    data = make(f"SELECT '{quoted}' AS \"<script>x</script>\", ['{quoted}'] AS l")
    chart = Chart(png=picture(context), title=evil)
    text = written(context, evil, Section(heading=evil, text=evil, table=data, chart=chart))
    page = Elements(text)
    assert {"script", "b", "a", "iframe", "svg"}.isdisjoint(tag for tag, _, _ in page.found)
    assert all(not name.startswith("on") for _, attributes, _ in page.found for name in attributes)
    assert page.texts("h1", "h2") == [evil, evil]
    assert page.texts("td")[0] == evil
    assert page.texts("th")[0] == "<script>x</script>"


def test_report_needs_no_network_and_no_script(context: Context) -> None:
    text = written(context, "T", Section(heading="A", chart=Chart(png=picture(context))))
    assert "default-src 'none'" in text
    assert re.findall(r"https?://|url\(|@import|<script|<link", text) == []


def test_report_of_the_same_is_the_same(context: Context) -> None:
    section = Section(heading="A", text="x")
    assert report("T", [section], context=context) == report("T", [section], context=context)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": 1001}, {"tabel": None}, {"heading": None}])
def test_section_that_is_wrong_is_not_taken(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Section.model_validate({"heading": "A", **wrong})
