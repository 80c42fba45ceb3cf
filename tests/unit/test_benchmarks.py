"""The benchmarks' arithmetic: shapes, the order of a race, ratios, targets and tables. No time is taken here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chart import draw, points
from benchmarks.field import CORE, FIELD, PEERS
from benchmarks.race import Heat, Outcome, pace_of, race
from benchmarks.shapes import Graph, Shape, read_graph
from benchmarks.table import figure, heat_table, label, replace_marked, short, speed_table, times
from benchmarks.targets import Target, target_table, targets

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def heat(*outcomes: tuple[str, str, Sequence[float]], cut: dict[str, float] | None = None) -> Heat:
    made = {(s, c): Outcome(shape=s, contender=c, values=list(values)) for s, c, values in outcomes}
    for (_, contender), outcome in made.items():
        outcome.cut = (cut or {}).get(contender)
    return Heat(name="core", outcomes=made)


class Scripted:
    """A contender whose answers are known before."""

    def __init__(self, asked: list[tuple[str, str]], name: str, **answers: Sequence[dict[str, Any]]) -> None:
        self.asked, self.name = asked, name
        self.answers = {shape: iter(given) for shape, given in answers.items()}

    def ask(self, shape: str, limit: float) -> dict[str, Any]:
        self.asked.append((shape, self.name))
        return next(self.answers[shape])


@pytest.mark.parametrize(
    ("name", "tasks", "edges", "path"),
    [
        ("W100", 101, 100, 2), ("D1", 1, 0, 1), ("D500", 500, 499, 500), ("L10x10", 101, 910, 11),
        ("L3x5", 16, 55, 4), ("N50", 101, 150, 52), ("N1", 3, 3, 3), ("S500", 5, 6, 3), ("submit1000", 1000, 999, 2),
    ],
)  # fmt: skip
def test_shape_has_its_tasks_dependencies_and_longest_path(name: str, tasks: int, edges: int, path: int) -> None:
    shape = Shape.named(name)
    graph = shape.graph()
    assert (len(graph), graph.edges, len(graph.levels)) == (tasks, edges, path)
    if shape.kind != "S":
        assert shape.tasks == tasks
    if shape.longest_path:
        assert shape.longest_path == path
    assert all(need < task for task, needs in enumerate(graph.needs) for need in needs)
    assert sorted(task for level in graph.levels for task in level) == list(range(tasks))


@pytest.mark.parametrize("name", ["W0", "X5", "L10", "L0x5", "D", "w100", "W1000 "])
def test_shape_that_does_not_exist_is_refused_with_examples(name: str) -> None:
    with pytest.raises(ValueError, match="W1000, D100"):
        Shape.named(name)


def test_shape_that_is_several_graphs_or_none_has_no_one_graph() -> None:
    for name in ("R400", "idle10"):
        with pytest.raises(ValueError, match="is not one graph"):
            Shape.named(name).graph()


@pytest.mark.parametrize(("name", "layered"), [("W5", True), ("D5", True), ("L3x4", True), ("S1", True), ("N5", False)])
def test_only_a_ladder_loses_parallelism_when_it_is_run_level_by_level(name: str, *, layered: bool) -> None:
    assert Shape.named(name).graph().is_layered is layered


def test_first_chain_of_a_ladder_never_waits_for_the_second() -> None:
    needs = Shape.named("N4").graph().needs
    assert [needs[2 * rung] for rung in range(4)] == [(), (0,), (2,), (4,)]
    assert [needs[2 * rung + 1] for rung in range(4)] == [(0,), (1, 2), (3, 4), (5, 6)]


def test_real_graph_is_read_with_edges_from_either_end_and_its_tasks_in_order(tmp_path: Path) -> None:
    tasks = [
        {"id": "last", "parents": ["a"], "children": []},
        {"id": "a", "parents": [], "children": ["b"]},
        {"id": "b", "parents": [], "children": ["last"]},
    ]
    for name, found in (("real", tasks), ("larger", [*tasks, {"id": "c", "parents": [], "children": []}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"workflow": {"specification": {"tasks": found}}}))
    assert read_graph(tmp_path / "real.json").needs == ((), (0,), (0, 1))
    assert [graph.name for graph in Shape.named("R3").graphs(tmp_path)] == ["real"]
    assert Shape.named("R3").graphs(None) == []


def test_real_graph_with_a_cycle_is_refused(tmp_path: Path) -> None:
    tasks = [{"id": "a", "parents": ["b"], "children": []}, {"id": "b", "parents": ["a"], "children": []}]
    path = tmp_path / "cycle.json"
    path.write_text(json.dumps({"workflow": {"specification": {"tasks": tasks}}}))
    with pytest.raises(ValueError, match="wait for each other"):
        read_graph(path)


def test_race_passes_over_all_shapes_again_and_again_and_turns_the_order_of_contenders_with_each_pass() -> None:
    asked: list[tuple[str, str]] = []
    seconds = [{"seconds": 1.0}] * 3
    runners = {name: Scripted(asked, name, D5=seconds, W5=seconds) for name in ("ours", "bare", "redis")}
    race("core", runners, ["D5", "W5"], repeats=3, budget=60)
    order = ["ours", "bare", "redis", "bare", "redis", "ours", "redis", "ours", "bare"]
    assert asked == [(shape, name) for n in (0, 3, 6) for shape in ("D5", "W5") for name in order[n : n + 3]]


def test_race_asks_no_more_after_a_cut_or_a_refusal_and_no_larger_shape_after_a_cut() -> None:
    asked: list[tuple[str, str]] = []
    fine = [{"seconds": 1.0}] * 2
    runners = {
        "ours": Scripted(asked, "ours", D5=fine, D50=fine, W5=fine),
        "redis": Scripted(asked, "redis", D5=[{"cut": 60.0}], W5=fine),
        "bare": Scripted(asked, "bare", D5=[{"cannot": "has no order"}], D50=[{"error": "broke"}], W5=fine),
    }
    found = race("core", runners, ["D5", "D50", "W5"], repeats=2, budget=60)
    assert [a for a in asked if a[1] == "redis"] == [("D5", "redis"), ("W5", "redis"), ("W5", "redis")]
    assert [a for a in asked if a[1] == "bare"] == [("D5", "bare"), ("D50", "bare"), ("W5", "bare"), ("W5", "bare")]
    assert figure(found.outcomes["D50", "redis"]) == "> 60.0"
    assert figure(found.outcomes["D5", "bare"]) == "has no order"
    assert figure(found.outcomes["D50", "bare"]) == "broke"
    assert found.ratio("D50", "bare") is None


def test_race_runs_what_is_not_compared_by_ours_alone_and_idle_time_and_memory_once_at_the_end() -> None:
    asked: list[tuple[str, str]] = []
    runners = {
        name: Scripted(asked, name, idle5=[{"cpu": 0.01}], M5=[{"megabytes": 90.0}], submit5=[{"seconds": 0.1}] * 3)
        for name in ("ours", "redis")
    }
    found = race("core", runners, ["idle5", "M5", "submit5"], repeats=3, budget=60)
    once = [("idle5", "ours"), ("M5", "ours")]
    assert asked == [("submit5", "ours"), ("submit5", "ours"), *once, ("submit5", "ours")]
    assert len(found.paces) == 4
    assert re.search(r"took \d+ to \d+ ms", pace_of([found]))
    assert pace_of([heat()]) == ""
    assert Heat.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.median("M5", "ours") == 90.0


def test_ratio_is_of_medians_with_the_least_and_greatest_of_a_repetition() -> None:
    ratio = heat(("W5", "ours", [1.0, 2.0, 4.0]), ("W5", "redis", [6.0, 4.0, 8.0])).ratio("W5", "redis")
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.greatest, ratio.bound) == (3.0, 2.0, 6.0, False)
    assert times(ratio) == "3.00 (2.00-6.00)"


def test_ratio_to_one_that_was_cut_is_a_bound_and_to_one_without_figures_is_none() -> None:
    cut = heat(("W5", "ours", [2.0]), ("W5", "redis", []), cut={"redis": 60.0})
    assert times(cut.ratio("W5", "redis")) == "> 30.0"
    assert cut.ratio("W5", "bare") is None
    assert heat(("W5", "ours", []), ("W5", "redis", [1.0])).ratio("W5", "redis") is None


def test_heat_is_the_same_after_it_was_written_and_read() -> None:
    before = heat(("W5", "ours", [2.0, 3.0]), ("W5", "redis", []), cut={"redis": 60.0})
    assert Heat.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_targets_compare_with_what_is_wanted_at_least_and_at_most() -> None:
    found = {
        target.what: target
        for target in targets([
            heat(
                ("W1000", "ours", [1.0]), ("W1000", "bare", [1.5]), ("W1000", "redis", [1.7]), ("D100", "ours", [0.1]),
                ("D10000", "ours", [12.0]), ("submit10000", "ours", [0.6]), ("idle30", "ours", [0.01]),
                ("S500", "ours", [4.0]), ("B500", "ours", [2.0]), ("M1000", "ours", [100.0]), ("M100000", "ours", [140.0]),
            ),
            Heat(name="dbos", outcomes={
                (s, c): Outcome(shape=s, contender=c, values=[seconds])
                for s, c, seconds in (("D100", "ours", 0.1), ("D100", "dbos", 0.5), ("N50", "ours", 0.1), ("N50", "dbos", 0.3))
            }),
        ])
    }  # fmt: skip
    verdicts = {what: (target.reached, target.verdict) for what, target in found.items()}
    assert verdicts["W1000: bare takes times as long"] == (1.5, "yes")
    assert verdicts["W1000: redis takes times as long"] == (1.7, "no")
    assert verdicts["W10000: bare takes times as long"] == (None, "not measured")
    assert verdicts["D10000: seconds per hop against D100"] == (pytest.approx(1.2), "yes")
    assert verdicts["submit of 10,000 tasks, seconds"] == (0.6, "no")
    assert verdicts["idle stack, share of a core"] == (0.01, "yes")
    assert verdicts["W100000: peak memory against W1000"] == (pytest.approx(1.4), "no")
    small = {how: verdicts[f"small executions, {how}: tasks/s against W1000"] for how in ("a call for each", "a call for each client's")}
    assert list(small.values()) == [(pytest.approx(2500 / 4 / 1001), "no"), (pytest.approx(2500 / 2 / 1001), "yes")]
    dbos = found["dbos takes times as long, the least of its shapes"]
    assert (dbos.reached, dbos.where, dbos.verdict) == (pytest.approx(3.0), " (N50)", "yes")


def test_real_graphs_are_held_against_the_rate_of_the_bare_drain() -> None:
    real = Outcome(shape="R400", contender="ours", values=[12.0], more={"tasks": 5005})
    core = heat(("W1000", "bare", [2.0]))
    core.outcomes["R400", "ours"] = real
    (target,) = (t for t in targets([core]) if t.what.startswith("real graphs"))
    assert (target.reached, target.verdict) == (pytest.approx(1.2), "yes")


@pytest.mark.parametrize(
    ("reached", "bound", "verdict"), [(20.0, True, "yes"), (8.0, True, "cut too early to tell"), (8.0, False, "no")]
)
def test_bound_below_what_is_wanted_is_no_verdict(reached: float, verdict: str, *, bound: bool) -> None:
    target = Target(what="x", wanted=12, at_least=True, reached=reached, bound=bound)
    assert target.verdict == verdict
    assert target.to_json()["verdict"] == verdict
    assert f"| at least 12 | {'> ' if bound else ''}{short(reached)} | {verdict} |" in target_table([target])


def test_tables_show_every_shape_and_ratios_to_ours_alone() -> None:
    core = heat(("W1000", "ours", [1.0, 1.2]), ("W1000", "redis", [2.2, 2.2]), ("D100", "ours", [0.05]))
    assert heat_table(core).splitlines()[2] == "| W1000 | 1.10 (1.00-1.20) | 2.20 (2.20-2.20) | 2.00 (1.83-2.20) |"
    lines = speed_table([core]).splitlines()
    assert lines[0] == "|  | Chordal | Celery canvas, Redis results |"
    assert lines[2:] == ["| 1,000 wide, joined | 1.10 (1.00-1.20) | 2.00 (1.83-2.20) |", "| chain of 100 | 0.050 |  |"]


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.0123, "0.012")])
def test_figure_has_three_places_at_most(value: float, text: str) -> None:
    assert short(value) == text


def test_table_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    once = replace_marked("a\n<!-- speed -->\nold\n<!-- /speed -->\nb\n", "new\n")
    assert once == "a\n<!-- speed -->\n\nnew\n\n<!-- /speed -->\nb\n"
    assert replace_marked(once, "new") == once
    with pytest.raises(ValueError, match="there is no"):
        replace_marked("a\nb\n", "new")


def test_chart_has_a_point_for_each_comparison_and_none_for_ours() -> None:
    core = heat(
        ("W1000", "ours", [1.0]), ("W1000", "redis", [2.0]), ("idle5", "ours", [0.1]), ("idle5", "redis", [0.1])
    )
    (point,) = points([core])
    assert (point["shape"], point["who"], point["ratio"]) == (label("W1000"), FIELD["redis"].title, 2.0)
    picture = draw([core], "somewhere")
    assert picture.startswith("<svg")
    assert {"somewhere", label("W1000"), FIELD["redis"].title} <= set(re.findall(r">([^<>]+)</text>", picture))


def test_field_names_modules_and_pins_that_are_there() -> None:
    assert {"ours", "bare", "redis", "postgres"} <= set(CORE)
    assert PEERS == ("dbos", "director", "dyrygent", "prefect")
    for entry in FIELD.values():
        module, _, name = entry.runs.partition(":")
        assert f"class {name}(" in (BENCHMARKS.parent / f"{module.replace('.', '/')}.py").read_text()
        if entry.environment:
            pins = (BENCHMARKS / "environments" / f"{entry.environment}.txt").read_text().splitlines()
            bare = {re.sub(r"\[.*\]", "", requirement) for requirement in entry.requirements}
            assert bare <= set(pins)


def test_graph_of_one_level_has_no_dependencies() -> None:
    assert Graph("x", ((), ())).levels == [[0, 1]]
