from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from handlers.chart import plot
from pipeline import ArtifactStore, Context, Dataset, Fail, ParamsError

DELAYS = """
    SELECT * FROM (VALUES
        ('EWR', 1, DATE '2013-01-01', 12.5, TRUE), ('JFK', 1, DATE '2013-01-01', -1.5, FALSE),
        ('EWR', 2, DATE '2013-02-01', 8.0, TRUE), ('JFK', 2, DATE '2013-02-01', NULL, NULL)
    ) AS t(origin, hour, "first.day", delay, late)
"""

Make = Callable[[str], Dataset]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    store = ArtifactStore(root=str(tmp_path), folder="exec-1/plot[0]/1")
    return Context(execution_id="exec-1", task_id="plot[0]", workflow_id="w", attempt=1, artifacts=store)


@pytest.fixture
def make(context: Context) -> Make:
    def dataset(sql: str) -> Dataset:
        with context.artifacts.write("data.parquet") as writing, duckdb.connect() as connection:
            connection.execute(f"COPY ({sql}) TO '{writing.path}' (FORMAT parquet)")
            relation = connection.sql(f"SELECT * FROM '{writing.path}'")
            rows, columns = len(relation), relation.columns
        return writing.dataset(rows=rows, columns=columns)

    return dataset


def page(context: Context, result: dict[str, Any]) -> str:
    with context.artifacts.read(result["html"].uri) as path:
        return path.read_text(encoding="utf-8")


def spec(context: Context, result: dict[str, Any]) -> dict[str, Any]:
    line = next(line for line in page(context, result).splitlines() if line.startswith('vegaEmbed("#chart", '))
    found: dict[str, Any] = json.JSONDecoder().raw_decode(line.removeprefix('vegaEmbed("#chart", '))[0]
    return found


def test_plot_gives_a_png_of_twice_the_pixels_and_a_page(context: Context, make: Make) -> None:
    result = plot(make(DELAYS), "bar", "origin", "delay", title="Delays", width=300, height=200, context=context)
    assert result["title"] == "Delays"
    assert (result["png"].media_type, result["html"].media_type) == ("image/png", "text/html")
    with context.artifacts.read(result["png"].uri) as path:
        image = path.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert 600 < width < 900
    assert 400 < height < 700
    assert "<title>Delays</title>" in page(context, result)


def test_plot_page_needs_no_network(context: Context, make: Make) -> None:
    text = page(context, plot(make(DELAYS), "bar", "origin", "delay", context=context))
    assert "default-src 'none'" in text
    assert re.findall(r"<(?:script|link|iframe)\b[^>]+\b(?:src|href)\b", text) == []
    assert re.findall(r"jsdelivr|unpkg|cdnjs|googleapis|@import", text) == []
    assert "vegaEmbed=" in text.replace(" ", "")


def test_plot_values_cannot_leave_the_script(context: Context, make: Make) -> None:
    data = make("SELECT '</script><script>alert(1)</script><!--' AS \"<b>\", 1 AS n")
    result = plot(data, "bar", "<b>", "n", title="</title><script>alert(2)</script>", context=context)
    text = page(context, result)
    assert text.count("<script>") == text.count("</script>") == 2
    assert "<script>alert" not in text
    assert "<!--" not in text.rpartition("vegaEmbed(")[2]
    assert spec(context, result)["data"]["values"][0]["x"] == "</script><script>alert(1)</script><!--"


@pytest.mark.parametrize(
    ("mark", "x", "y", "color", "types"),
    [
        ("bar", "origin", "delay", None, ("nominal", "quantitative")),
        ("bar", "delay", "origin", None, ("quantitative", "nominal")),
        ("bar", "hour", "delay", "origin", ("ordinal", "quantitative")),
        ("bar", "first.day", "delay", "origin", ("temporal", "quantitative")),
        ("line", "first.day", "delay", "origin", ("temporal", "quantitative")),
        ("area", "first.day", "delay", "origin", ("temporal", "quantitative")),
        ("point", "hour", "delay", "late", ("quantitative", "quantitative")),
        ("heatmap", "hour", "origin", "delay", ("ordinal", "nominal")),
        ("heatmap", "first.day", "hour", "delay", ("temporal", "ordinal")),
    ],
)
def test_plot_scales_suit_the_columns(
    context: Context, make: Make, mark: Any, x: str, y: str, color: str | None, types: tuple[str, str]
) -> None:
    result = plot(make(DELAYS), mark, x, y, color, context=context)
    encoding = spec(context, result)["encoding"]
    assert (encoding["x"]["type"], encoding["y"]["type"]) == types
    assert result["png"].bytes > 5_000


def test_plot_dates_keep_their_day_in_every_zone(context: Context, make: Make) -> None:
    drawn = spec(context, plot(make(DELAYS), "bar", "first.day", "delay", context=context))
    assert drawn["data"]["values"][0]["x"] == "2013-01-01T00:00:00.000"
    assert drawn["encoding"]["x"]["timeUnit"] == "yearmonth"


@pytest.mark.parametrize(("sort", "given"), [("-y", "-y"), ("descending", "descending"), ("data", None)])
def test_plot_sort_orders_the_axis_of_names(context: Context, make: Make, sort: Any, given: str | None) -> None:
    data = make(DELAYS)
    upright = spec(context, plot(data, "bar", "origin", "delay", sort=sort, context=context))["encoding"]
    lying = spec(context, plot(data, "bar", "delay", "origin", sort=sort, context=context))["encoding"]
    assert upright["x"]["sort"] == lying["y"]["sort"] == given
    assert "sort" not in upright["y"]
    assert "sort" not in lying["x"]


def test_plot_titles_of_axes_are_the_columns_or_as_given(context: Context, make: Make) -> None:
    data = make("SELECT 'a' AS the_name, 1 AS n")
    axes = spec(context, plot(data, "bar", "the_name", "n", y_title="", context=context))["encoding"]
    assert (axes["x"]["title"], axes["y"]["title"]) == ("the name", None)
    assert (
        spec(context, plot(data, "bar", "the_name", "n", x_title="X", context=context))["encoding"]["x"]["title"] == "X"
    )


def test_plot_tooltip_shows_further_columns(context: Context, make: Make) -> None:
    drawn = spec(context, plot(make(DELAYS), "point", "hour", "delay", tooltip=["first.day"], context=context))
    assert [hint["title"] for hint in drawn["encoding"]["tooltip"]] == ["first.day"]
    assert drawn["data"]["values"][2]["tooltip0"] == "2013-02-01T00:00:00.000"


@pytest.mark.parametrize("where", [{"x": "carrier"}, {"y": "carrier"}, {"color": "carrier"}, {"tooltip": ["carrier"]}])
def test_plot_column_that_is_absent_names_those_that_exist(context: Context, make: Make, where: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=r"no column 'carrier'; the data set has 'origin', 'hour', 'first\.day'"):
        plot(make(DELAYS), "bar", **{"x": "origin", "y": "delay", **where}, context=context)


def test_plot_heatmap_without_color_is_a_params_error(context: Context, make: Make) -> None:
    with pytest.raises(ParamsError, match="color"):
        plot(make(DELAYS), "heatmap", "hour", "origin", context=context)


def test_plot_more_rows_than_5000_fails(context: Context, make: Make) -> None:
    plot(make("SELECT range AS n FROM range(5000)"), "line", "n", "n", context=context)
    with pytest.raises(Fail, match="5000 rows and the data set has 5001: aggregate first"):
        plot(make("SELECT range AS n FROM range(5001)"), "point", "n", "n", context=context)


def test_plot_more_colors_than_20_fails(context: Context, make: Make) -> None:
    sql = "SELECT range AS n, 'c' || range AS c FROM range({})"
    plot(make(sql.format(20)), "point", "n", "n", "c", context=context)
    with pytest.raises(Fail, match="21 names"):
        plot(make(sql.format(21)), "point", "n", "n", "c", context=context)


def test_plot_of_no_rows_is_an_empty_chart(context: Context, make: Make) -> None:
    assert plot(make(f"{DELAYS} WHERE FALSE"), "bar", "first.day", "delay", context=context)["png"].bytes > 0


def test_plot_numbers_that_json_cannot_hold_are_left_out(context: Context, make: Make) -> None:
    data = make("SELECT unnest([1, 'nan'::DOUBLE, 'inf'::DOUBLE, NULL]) AS v, 12345678901234567890::HUGEINT AS big")
    values = spec(context, plot(data, "point", "big", "v", context=context))["data"]["values"]
    assert [row["y"] for row in values] == [1, None, None, None]
    assert values[0]["x"] == 12345678901234567890.0
