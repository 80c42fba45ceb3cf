"""What is wanted of the figures, and whether it is reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.race import Heat, Ratio
from benchmarks.shapes import Shape
from benchmarks.table import markdown, short

#: how many times longer others should take than ours
CORE_RATIOS = (
    ("W1000", "bare", 1.25), ("W10000", "bare", 1.25),
    ("W1000", "redis", 1.8), ("W1000", "postgres", 6.0),
    ("D100", "redis", 2.0), ("D500", "redis", 5.0), ("D2000", "redis", 15.0),
    ("L10x10", "redis", 4.0), ("L20x20", "redis", 12.0), ("L50x20", "redis", 20.0),
)  # fmt: skip
#: the same for peers, on every shape that they can run
PEER_RATIOS = (("dbos", 2.0), ("dbos-queues", 5.0), ("director", 3.0), ("dyrygent", 3.0), ("prefect", 3.0))
SUBMIT_SECONDS, IDLE_SHARE, START_SECONDS = 0.5, 0.02, 1.5
HOP_GROWTH, SIZE_GROWTH, MEMORY_GROWTH, REAL_GRAPHS, SMALL_RATE = 1.3, 1.2, 1.3, 1.5, 0.8


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row: what is wanted, at least or at most, and what was reached."""

    what: str
    wanted: float
    at_least: bool
    reached: float | None
    #: whether what was reached is a lower bound, for the other was cut
    bound: bool = False
    where: str = ""

    @property
    def verdict(self) -> str:
        """yes, no, or why neither."""
        if self.reached is None:
            return "not measured"
        if self.at_least and self.reached < self.wanted and self.bound:
            return "cut too early to tell"
        return "yes" if (self.reached >= self.wanted if self.at_least else self.reached <= self.wanted) else "no"

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {**asdict(self), "verdict": self.verdict}

    def cells(self) -> list[str]:
        """For the table."""
        sign = "at least" if self.at_least else "at most"
        reached = "" if self.reached is None else f"{'> ' if self.bound else ''}{short(self.reached)}{self.where}"
        return [self.what, f"{sign} {self.wanted:g}", reached, self.verdict]


def targets(heats: Sequence[Heat]) -> list[Target]:
    """Every row, also those that were not measured."""
    return [*_ratios(heats), *_peers(heats), *_bounds(heats)]


def target_table(found: Sequence[Target]) -> str:
    """The rows as text."""
    return markdown(["target", "wanted", "reached", "reached?"], [target.cells() for target in found])


def _ratios(heats: Sequence[Heat]) -> Iterator[Target]:
    for shape, contender, wanted in CORE_RATIOS:
        ratio = next((r for heat in heats if (r := heat.ratio(shape, contender))), None)
        yield _at_least(f"{shape}: {contender} takes times as long", wanted, ratio)


def _peers(heats: Sequence[Heat]) -> Iterator[Target]:
    for contender, wanted in PEER_RATIOS:
        ratios = [
            (ratio, shape)
            for heat in heats
            for shape, name in heat.outcomes
            if name == contender and Shape.named(shape).measure == "seconds" and (ratio := heat.ratio(shape, contender))
        ]
        ratio, shape = min(ratios, key=lambda found: found[0].median, default=(None, ""))
        yield _at_least(f"{contender} takes times as long, the least of its shapes", wanted, ratio, shape)


def _bounds(heats: Sequence[Heat]) -> Iterator[Target]:
    def ours(shape: str) -> float | None:
        return next((m for heat in heats if (m := heat.median(shape, "ours")) is not None), None)

    def at_most(what: str, wanted: float, reached: float | None) -> Target:
        return Target(what=what, wanted=wanted, at_least=False, reached=reached)

    bare = next((m for heat in heats if (m := heat.median("W1000", "bare"))), None)
    real = next((o for heat in heats for (s, c), o in heat.outcomes.items() if s.startswith("R") and c == "ours"), None)
    yield at_most("D10000: seconds per hop against D100", HOP_GROWTH, _divide(ours("D10000"), ours("D100"), 1 / 100))
    yield at_most("W100000: time against 10 x W10000", SIZE_GROWTH, _divide(ours("W100000"), ours("W10000"), 1 / 10))
    yield at_most("W100000: peak memory against W1000", MEMORY_GROWTH, _divide(ours("M100000"), ours("M1000")))
    tasks = real.more.get("tasks") if real is not None and real.values else None
    ideal = bare * tasks / 1001 if bare and tasks else None
    yield at_most(
        "real graphs: time against tasks / bare drain rate",
        REAL_GRAPHS,
        _divide(real.median if real is not None else None, ideal),
    )
    yield at_most("submit of 10,000 tasks, seconds", SUBMIT_SECONDS, ours("submit10000"))
    for kind, how in (("S", "a call for each"), ("B", "a call for each client's")):
        small = next((name for heat in heats for name, c in heat.outcomes if name[0] == kind and c == "ours"), None)
        rate = _divide(ours("W1000"), ours(small), Shape.named(small).tasks / 1001) if small else None
        yield Target(what=f"small executions, {how}: tasks/s against W1000", wanted=SMALL_RATE, at_least=True, reached=rate)
    idle = next((name for heat in heats for name, c in heat.outcomes if name.startswith("idle") and c == "ours"), "")
    yield at_most("idle stack, share of a core", IDLE_SHARE, ours(idle))
    yield at_most("start of a worker, seconds", START_SECONDS, ours("start2"))


def _at_least(what: str, wanted: float, ratio: Ratio | None, where: str = "") -> Target:
    shown = f" ({where})" if where else ""
    return Target(
        what=what, wanted=wanted, at_least=True, reached=ratio.median if ratio else None, where=shown,
        bound=bool(ratio and ratio.bound),
    )  # fmt: skip


def _divide(a: float | None, b: float | None, factor: float = 1.0) -> float | None:
    return a / b * factor if a and b else None
