"""The compiler against its law: exactly the definition's partial order, read back from Celery's own objects."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise, product

import pytest
from celery import chord
from celery.canvas import Signature
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compiler import END, SLOTS, WIDE, CompiledWorkflow, compile_workflow
from pipeline.definition import TaskDefinition, WorkflowDefinition
from pipeline.errors import DefinitionError, NotSeriesParallel, PipelineError

Graph = Mapping[str, Iterable[str]]
Pairs = set[tuple[str, str]]

examples = settings(deadline=None, derandomize=True, max_examples=150)


def define(graph: Graph, **fields: object) -> WorkflowDefinition:
    tasks = tuple(TaskDefinition(id=t, handler=f"h.{t}", dependencies=tuple(needs)) for t, needs in graph.items())
    return WorkflowDefinition(id="w", tasks=tasks, **fields)


def edges_of(graph: Graph) -> Pairs:
    return {(need, t) for t, needs in graph.items() for need in needs}


def closure(tasks: Iterable[str], edges: Pairs) -> Pairs:
    reached = set(edges)
    for middle in tasks:
        before = {a for a, b in reached if b == middle}
        after = {b for a, b in reached if a == middle}
        reached |= set(product(before, after))
    return reached


def task_id(sig: Signature) -> str:
    assert sig.subtask_type is None
    assert sig.immutable
    (found,) = sig.args
    assert sig.task == f"h.{found}"
    return str(found)


def members(sig: Signature) -> list[str]:
    assert sig.subtask_type == "group"
    return [task_id(member) for member in sig.tasks]


def started_by(compiled: CompiledWorkflow, tasks: Iterable[str]) -> tuple[list[str], Pairs, list[str]]:
    """What Celery's objects say: each start of a task, each edge, and the header of the end."""
    starts, edges = members(compiled.entry), set()
    for t in tasks:
        released = members(compiled.fan_out(t))
        starts += released
        edges |= {(t, r) for r in released}
        if len(compiled.dependencies[t]) > 1:
            join = compiled.join(t)
            assert isinstance(join, chord)
            assert task_id(join.body) == t
            starts.append(t)
            edges |= {(task_id(h), t) for h in join.tasks}
    end = compiled.end
    assert isinstance(end, chord)
    assert (end.body.task, end.body.args) == (END, ())
    return starts, edges, [task_id(h) for h in end.tasks]


@st.composite
def graphs(draw: st.DrawFn, most: int = 12) -> dict[str, list[str]]:
    """Any DAG, its tasks named and listed in any order."""
    size = draw(st.integers(1, most))
    ids = draw(st.permutations([f"t{n}" for n in range(size)]))
    needs = {ids[n]: draw(st.lists(st.sampled_from(ids[:n]), unique=True)) if n else [] for n in range(size)}
    return {t: needs[t] for t in draw(st.permutations(ids))}


@examples
@given(graphs())
def test_compile_any_dag_gives_its_edges_and_starts_each_task_once(graph: dict[str, list[str]]) -> None:
    compiled = compile_workflow(define(graph))
    starts, edges, sinks = started_by(compiled, graph)
    assert sorted(starts) == sorted(graph)
    assert edges == edges_of(graph)
    assert closure(graph, edges) == closure(graph, edges_of(graph))
    assert set(sinks) == set(graph) - {need for need, _ in edges_of(graph)}
    assert len(sinks) == len(set(sinks))


@examples
@given(graphs())
def test_compile_any_dag_orders_by_dependency_then_by_definition(graph: dict[str, list[str]]) -> None:
    compiled = compile_workflow(define(graph))
    expected: list[str] = []
    while len(expected) < len(graph):
        expected.append(next(t for t in graph if t not in expected and set(graph[t]) <= set(expected)))
    assert list(compiled.order) == expected
    for tasks in (*compiled.dependencies.values(), *(header.tasks for header in compiled.headers)):
        assert list(tasks) == [t for t in compiled.order if t in tasks]


@examples
@given(graphs())
def test_compile_any_dag_shares_one_header_among_tasks_that_wait_for_the_same(graph: dict[str, list[str]]) -> None:
    compiled = compile_workflow(define(graph))
    end, *joins = compiled.headers
    assert [header.number for header in compiled.headers] == list(range(len(compiled.headers)))
    assert end.bodies == ()
    assert len({frozenset(j.tasks) for j in joins}) == len(joins)
    assert {t for j in joins for t in j.bodies} == {t for t in graph if len(graph[t]) > 1}
    assert all(compiled.dependencies[body] == j.tasks for j in joins for body in j.bodies)
    stands = {t: tuple(h.number for h in compiled.headers if t in h.tasks) for t in graph}
    assert compiled.memberships == {t: numbers for t, numbers in stands.items() if numbers}


@examples
@given(graphs(), st.randoms(use_true_random=False))
def test_compile_shuffled_definition_changes_nothing_but_ties(graph: dict[str, list[str]], die: random.Random) -> None:
    shuffled = {t: die.sample(graph[t], len(graph[t])) for t in die.sample(list(graph), len(graph))}
    one, other = compile_workflow(define(graph)), compile_workflow(define(shuffled))
    assert started_by(one, graph)[1] == started_by(other, graph)[1]
    for left, right in zip(
        ((h.tasks, h.bodies) for h in sorted(one.headers, key=lambda h: (h.number > 0, sorted(h.tasks)))),
        ((h.tasks, h.bodies) for h in sorted(other.headers, key=lambda h: (h.number > 0, sorted(h.tasks)))),
        strict=True,
    ):
        assert [sorted(part) for part in left] == [sorted(part) for part in right]
    assert compile_workflow(WorkflowDefinition.from_json(define(graph).to_json())) == one


@examples
@given(graphs())
def test_compile_without_parallelism_gives_a_total_order_that_respects_the_dag(graph: dict[str, list[str]]) -> None:
    compiled = compile_workflow(define(graph, enable_parallel=False))
    _, edges, sinks = started_by(compiled, graph)
    assert edges == set(pairwise(compiled.order))
    assert sorted(compiled.order) == sorted(graph)
    assert sinks == [compiled.order[-1]]
    assert all(compiled.order.index(need) < compiled.order.index(t) for need, t in edges_of(graph))
    assert canvas_order(compiled.to_canvas()) == (set(graph), closure(graph, edges))


# A canvas is read back by the meaning that Celery gives it: a chain step waits for all of the step before it, and a
# chord's body for all of its header.


def canvas_order(sig: Signature) -> tuple[set[str], Pairs]:
    match sig.subtask_type:
        case None:
            return {task_id(sig)}, set()
        case "group":
            return side_by_side(sig.tasks)
        case "chain":
            parts = [canvas_order(step) for step in sig.tasks]
        case "chord":
            parts = [side_by_side(sig.tasks), canvas_order(sig.body)]
    tasks, order = parts[0]
    for more, its_order in parts[1:]:
        order = order | its_order | set(product(tasks, more))
        tasks = tasks | more
    assert len(tasks) == sum(len(part) for part, _ in parts)
    return tasks, order


def side_by_side(sigs: Iterable[Signature]) -> tuple[set[str], Pairs]:
    parts = [canvas_order(sig) for sig in sigs]
    tasks = set().union(*(part for part, _ in parts))
    assert len(tasks) == sum(len(part) for part, _ in parts)
    return tasks, set().union(*(order for _, order in parts))


def has_n(graph: Graph) -> bool:
    """Whether four tasks stand as an N, which is what no series-parallel order has: a < c, b < c, b < d, no more."""
    below = closure(graph, edges_of(graph))

    def apart(x: str, y: str) -> bool:
        return x != y and (x, y) not in below and (y, x) not in below

    return any(
        (b, d) in below and apart(a, b) and apart(c, d) and apart(a, d)
        for (a, c), (b, other) in product(below, below)
        if c == other
        for d in graph
    )


@settings(examples, max_examples=300)
@given(graphs(most=7))
def test_to_canvas_any_dag_has_the_same_order_or_is_refused_for_an_n(graph: dict[str, list[str]]) -> None:
    compiled = compile_workflow(define(graph))
    if has_n(graph):
        with pytest.raises(NotSeriesParallel):
            compiled.to_canvas()
    else:
        assert canvas_order(compiled.to_canvas()) == (set(graph), closure(graph, edges_of(graph)))


Term = str | tuple[str, list["Term"]]
terms: st.SearchStrategy[Term] = st.recursive(
    st.just("task"),
    lambda inner: st.tuples(st.sampled_from(["series", "parallel"]), st.lists(inner, min_size=2, max_size=4)),
    max_leaves=16,
)


def order_of(term: Term, names: Iterable[str]) -> tuple[list[str], Pairs]:
    if isinstance(term, str):
        return [next(iter(names))], set()
    kind, inner = term
    tasks: list[str] = []
    order: Pairs = set()
    for part in inner:
        more, its_order = order_of(part, names)
        order |= its_order | (set(product(tasks, more)) if kind == "series" else set())
        tasks += more
    return tasks, order


@examples
@given(terms, st.randoms(use_true_random=False))
def test_to_canvas_series_parallel_order_is_kept_whatever_implied_edges_are_declared(
    term: Term, die: random.Random
) -> None:
    tasks, order = order_of(term, iter(f"t{n}" for n in range(100)))
    needed = {(a, c) for a, c in order if not any((a, b) in order and (b, c) in order for b in tasks)}
    edges = {edge for edge in sorted(order) if edge in needed or die.random() < 0.3}
    compiled = compile_workflow(define({t: [a for a, b in edges if b == t] for t in die.sample(tasks, len(tasks))}))
    assert canvas_order(compiled.to_canvas()) == (set(tasks), order)


def test_to_canvas_layers_all_to_all_are_a_chord_with_a_group_as_body() -> None:
    compiled = compile_workflow(define({"a": "", "b": "", "x": "", "c": "abx", "d": "abx"}))
    canvas = compiled.to_canvas()
    assert (canvas.subtask_type, canvas.body.subtask_type) == ("chord", "group")
    assert [[task_id(s) for s in part] for part in (canvas.tasks, canvas.body.tasks)] == [["a", "b", "x"], ["c", "d"]]


def test_to_canvas_n_is_refused_with_the_task_that_crosses() -> None:
    with pytest.raises(NotSeriesParallel, match="'b'"):
        compile_workflow(define({"a": "", "b": "", "c": "ab", "d": "b"})).to_canvas()


def test_to_canvas_deep_nesting_does_not_recurse() -> None:
    graph = {f"t{n}": [f"t{(n - 1) // 2 * 2}"] if n else [] for n in range(4001)}
    assert compile_workflow(define(graph)).to_canvas().subtask_type == "chain"


@pytest.mark.parametrize(
    "graph", [{"a": "a"}, {"a": "b", "b": "a"}, {"x": "", "y": "xc", "a": "c", "b": "a", "c": "bx"}]
)
def test_compile_circle_is_named_edge_by_edge(graph: Graph) -> None:
    with pytest.raises(DefinitionError) as caught:
        compile_workflow(define(graph))
    (problem,) = caught.value.problems
    circle = problem.what.removeprefix("circular dependency: ").split(" -> ")
    assert circle[0] == circle[-1]
    assert len(circle) > 1
    assert set(pairwise(circle)) <= edges_of(graph)
    assert problem.path == f"tasks[{list(graph).index(circle[0])}].dependencies"


def test_compile_long_chain_and_long_circle_do_not_recurse() -> None:
    chain = {f"t{n}": [f"t{n - 1}"] if n else [] for n in range(5000)}
    assert compile_workflow(define(dict(reversed(chain.items())))).order == tuple(chain)
    with pytest.raises(DefinitionError):
        compile_workflow(define(chain | {"t0": ["t4999"]}))


@pytest.mark.parametrize("width", [2, 64, 65, 100, 1000])
def test_compile_counts_a_wide_header_in_slots_of_which_neighbours_share_none(width: int) -> None:
    graph = {f"t{n}": list[str]() for n in range(width)}
    compiled = compile_workflow(define({**graph, "end": list(graph)}))
    _, join = compiled.headers
    found = [compiled.slots.get(task) for task in join.tasks]
    if width < WIDE:
        assert (join.slots, set(found)) == ((), {None})
        return
    assert len(join.slots) == SLOTS
    assert Counter(found) == {(slot,): tasks for slot, tasks in enumerate(join.slots, start=1)}
    assert sum(join.slots) == width
    assert all(mine != next_ for mine, next_ in pairwise(found))
    assert "end" not in compiled.slots


def test_compile_gives_the_slot_of_each_header_that_a_task_stands_in() -> None:
    wide = [f"t{n}" for n in range(WIDE)]
    compiled = compile_workflow(define({**{t: [] for t in wide}, "narrow": wide[:2], "wide": wide}))
    numbers = {len(header.tasks): header.number for header in compiled.headers if header.number}
    place = compiled.memberships["t1"].index(numbers[WIDE])
    assert compiled.slots["t1"][place] == 2
    assert compiled.slots["t1"][1 - place] == 0
    assert compiled.memberships["t2"] == (numbers[WIDE],)


def test_compile_layers_all_to_all_costs_one_header_each() -> None:
    graph = {f"t{n}_{k}": [f"t{n - 1}_{i}" for i in range(60)] if n else [] for n in range(40) for k in range(60)}
    compiled = compile_workflow(define(graph))
    assert [len(header.tasks) for header in compiled.headers] == [60] * 40
    assert set(compiled.memberships) == set(graph)
    assert all(len(numbers) == 1 for numbers in compiled.memberships.values())


def test_compile_dependency_named_twice_counts_once() -> None:
    compiled = compile_workflow(define({"a": "", "b": "aa"}))
    assert compiled.releases == {"a": ("b",)}


def test_objects_are_json_and_made_anew() -> None:
    compiled = compile_workflow(define({"a": "", "b": "", "c": "ab"}))
    compiled.entry.tasks.clear()
    compiled.end.tasks.clear()
    assert members(compiled.entry) == ["a", "b"]
    assert json.loads(json.dumps(compiled.join("c")))["kwargs"]["body"]["args"] == ["c"]


def test_join_task_with_one_dependency_has_no_chord() -> None:
    with pytest.raises(KeyError):
        compile_workflow(define({"a": "", "b": "a"})).join("b")


def test_not_series_parallel_is_one_of_ours() -> None:
    assert issubclass(NotSeriesParallel, PipelineError)
