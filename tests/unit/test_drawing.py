"""The four drawings of a compiled workflow: complete or honest about what they leave out, and always well-formed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as ET

import pytest

from pipeline.compiler import compile_workflow
from pipeline.definition import TaskDefinition, WorkflowDefinition
from pipeline.drawing import Format, draw
from pipeline.picture import BOX_LIMIT

SVG = "{http://www.w3.org/2000/svg}"
FLIGHTS = {
    "read": "", "weather": "", "clean": ["read"], "profile": ["read"], "audit": ["profile"],
    "delays": ["clean", "weather"], "routes": ["clean", "weather"], "report": ["delays", "routes"],
}  # fmt: skip
NASTY = 'a "quoted" <b>&amp; #1; it\'s\nend ]]> subgraph é \x00\x1b[2J'


def drawn(graph: Mapping[str, Iterable[str]], form: Format, name: str = "", title: str = "Flights") -> str:
    tasks = tuple(
        TaskDefinition(id=t, name=name or t, handler=f"{t[0]}.run", dependencies=tuple(needs))
        for t, needs in graph.items()
    )
    definition = WorkflowDefinition(id="flights", name=title, version="1.2", tasks=tasks)
    return draw(compile_workflow(definition), definition, form)


def wide(size: int) -> dict[str, list[str]]:
    ids = [f"t{n}" for n in range(size)]
    return {**{t: [] for t in ids}, "z": ids}


def boxes(svg: str) -> list[str]:
    return [task for element in ET.fromstring(svg).iter() if (task := element.get("data-task"))]


def test_text_shows_entry_fan_outs_chords_and_end() -> None:
    assert drawn(FLIGHTS, "text").splitlines() == [
        "Flights (flights version 1.2): 8 tasks, 9 dependencies, 2 chords",
        "",
        "entry: group",
        "├─ read           r.run",
        "│  ├─ clean       c.run",
        "│  └─ profile     p.run",
        "│     └> audit    a.run",
        "└─ weather        w.run",
        "",
        "chord 1",
        "├─ header: weather, clean",
        "└─ body: group",
        "   ├─ delays      d.run",
        "   └─ routes      r.run",
        "",
        "chord 2",
        "├─ header: delays, routes",
        "└─ body:",
        "   └─ report      r.run",
        "",
        "end: chord",
        "├─ header: audit, report",
        "└─ body: pipeline.end",
    ]


def test_text_long_lists_are_cut_with_a_count() -> None:
    text = drawn(wide(100), "text")
    assert "└─ ... and 80 more" in text
    assert "t11 ... and 88 more" in text
    assert "t20" not in text


def test_text_long_workflow_is_cut_and_still_names_the_end() -> None:
    text = drawn({f"t{n}": [f"t{n - 1}"] if n else [] for n in range(3000)}, "text")
    assert len(text.splitlines()) < 420
    assert "cut here" in text
    assert "├─ header: t2999" in text


def test_json_is_complete() -> None:
    assert json.loads(drawn(FLIGHTS, "json")) | {"digest": "", "handlers": {}} == {
        "id": "flights",
        "version": "1.2",
        "digest": "",
        "order": ["read", "weather", "clean", "profile", "audit", "delays", "routes", "report"],
        "entry": ["read", "weather"],
        "fan_outs": {"read": ["clean", "profile"], "profile": ["audit"]},
        "joins": [
            {"number": 1, "header": ["weather", "clean"], "bodies": ["delays", "routes"]},
            {"number": 2, "header": ["delays", "routes"], "bodies": ["report"]},
        ],
        "end": {"header": ["audit", "report"], "body": "pipeline.end"},
        "handlers": {},
    }
    assert json.loads(drawn(wide(3000), "json"))["joins"][0]["header"] == list(wide(3000))[:-1]


def test_mermaid_has_each_task_once_and_each_dependency() -> None:
    text = drawn(FLIGHTS, "mermaid")
    name = dict(re.findall(r'^\s+(t\d+)\["(\w+)<br/>', text, re.MULTILINE))
    assert sorted(name.values()) == sorted(FLIGHTS)
    assert len(re.findall(r"<br/>", text)) == len(FLIGHTS)
    edges = {(name[a], name[b]) for a, b in re.findall(r"(t\d+) --> (t\d+)", text)}
    header, bodies = re.findall(r"(t\d+) -\.-> (c\d+)", text), re.findall(r"(c\d+) ==> (t\d+)", text)
    edges |= {(name[a], name[b]) for a, chord in header for other, b in bodies if chord == other}
    assert edges == {(need, t) for t, needs in FLIGHTS.items() for need in needs}
    assert {name[a] for a, chord in header if chord == "c0"} == {"audit", "report"}
    assert text.count("subgraph") == sum(line.strip() == "end" for line in text.splitlines()) == 3


def test_mermaid_names_are_escaped() -> None:
    line = next(line for line in drawn({"end": ""}, "mermaid", name=NASTY).splitlines() if "t0[" in line)
    label = re.fullmatch(r'\s*t0\["(.*)<br/><small>e\.run</small>"\]', line)
    assert label
    assert not set('"<>&') & set(label[1])
    assert "#quot;quoted#quot; #lt;b#gt;#amp;amp; #35;1; it's end ]]" in label[1]


@pytest.mark.parametrize("size", [1, 2, 40, 399])
def test_svg_has_one_box_per_task(size: int) -> None:
    graph = wide(size)
    assert sorted(boxes(drawn(graph, "svg"))) == sorted(graph)


def test_svg_tells_single_dependencies_from_chords() -> None:
    root = ET.fromstring(drawn(FLIGHTS, "svg"))
    paths = [path.get("class") for path in root.findall(f"{SVG}path")]
    assert {kind: paths.count(kind) for kind in ("single", "header", "chord", "end")} == {
        "single": 3, "header": 4, "chord": 3, "end": 2,
    }  # fmt: skip
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert {"chord 1", "chord 2", "end", "read: r.run"} <= set(titles)


def test_svg_boxes_do_not_overlap_and_stand_right_of_what_they_wait_for() -> None:
    graph = FLIGHTS | {"late": ["read", "report"], "alone": ""}
    root = ET.fromstring(drawn(graph, "svg"))
    groups = [g for g in root.iter(f"{SVG}g") if g.get("data-task")]
    at = {g.get("data-task"): tuple(map(float, re.findall(r"[\d.]+", g.get("transform", "")))) for g in groups}
    frame = next(iter(groups[0].iter(f"{SVG}rect")))
    width, height = float(frame.get("width", 0)), float(frame.get("height", 0))
    for t, (x, y) in at.items():
        assert width / 2 <= x <= float(root.get("width", 0)) - width / 2
        assert height / 2 <= y <= float(root.get("height", 0)) - height / 2
        assert all(abs(x - x2) >= width or abs(y - y2) >= height for t2, (x2, y2) in at.items() if t2 != t)
    assert all(at[need][0] + width <= at[t][0] for t, needs in graph.items() for need in needs)


def test_svg_any_name_is_well_formed_and_kept() -> None:
    root = ET.fromstring(drawn({"a": "", "b": "a"}, "svg", name=NASTY, title=NASTY))
    assert root.get("aria-label", "").startswith('a "quoted" <b>&amp; #1; it\'s end')
    assert root.get("aria-label", "").endswith("é   [2J")


def test_text_control_characters_do_not_reach_the_terminal() -> None:
    text = drawn({"a": ""}, "text", title=NASTY)
    assert text.startswith('a "quoted" <b>&amp; #1; it\'s end ]]> subgraph é   [2J (flights version 1.2)')


def test_svg_nothing_is_fetched_or_run() -> None:
    svg = drawn(FLIGHTS, "svg").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"http|<script|<image|@import|href", svg)


def test_svg_large_fan_out_shares_a_box_and_says_so() -> None:
    svg = drawn(wide(10_000), "svg")
    assert boxes(svg) == ["t0", "z"]
    assert "×10,000" in svg
    assert "like tasks share a box" in svg
    assert "not drawn" not in svg


def test_svg_large_chain_leaves_the_last_tasks_out_and_says_so() -> None:
    svg = drawn({f"t{n}": [f"t{n - 1}"] if n else [] for n in range(10_000)}, "svg")
    assert boxes(svg) == [f"t{n}" for n in range(BOX_LIMIT)]
    assert "9,600 tasks are not drawn" in svg


def test_svg_edges_bend_in_the_columns_they_pass_until_there_are_too_many() -> None:
    def bends(size: int) -> set[int]:
        svg = drawn({f"t{n}": [f"t{k}" for k in range(n)] for n in range(size)}, "svg")
        return {path.count("C") for path in re.findall(r' d="(M[^"]*C[^"]*)"', svg)}

    assert bends(4) == {1, 3, 5}
    assert bends(60) == {1}


def test_drawings_are_deterministic() -> None:
    for form in ("text", "json", "mermaid", "svg"):
        assert drawn(FLIGHTS, form) == drawn(FLIGHTS, form)
