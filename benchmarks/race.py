"""The race: each pass over the shapes runs every contender of the heat, in an order that turns from one to the next.

So whatever is compared, contenders or shapes, has met the same minutes of the machine. What is run once comes with the last
pass: it leaves more rows, or other workers, than the rest should meet.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.machine import pace
from benchmarks.shapes import LONG, Shape


class Runner(Protocol):
    """Whoever can be asked for a run."""

    def ask(self, shape: str, limit: float) -> dict[str, Any]:
        """What it measured."""


@dataclass(kw_only=True)
class Outcome:
    """All runs of a shape by one contender."""

    shape: str
    contender: str
    values: list[float] = field(default_factory=list)
    #: seconds after which it was cut, so that its figure is a lower bound
    cut: float | None = None
    #: why there is no figure
    failure: str = ""
    #: what else was told of the last run
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Of the runs, with the limit for one that was cut."""
        values = self.values if self.cut is None else [*self.values, self.cut]
        return statistics.median(values) if values else None

    def record(self, answer: Mapping[str, Any], measure: str) -> None:
        """Take in a run."""
        if "cut" in answer:
            self.cut = float(answer["cut"])
        elif measure in answer:
            self.values.append(float(answer[measure]))
            self.more = {name: value for name, value in answer.items() if name != measure}
        else:
            self.failure = str(answer.get("cannot") or answer.get("error") or "no answer")

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Outcome:
        """What `to_json` wrote."""
        return cls(**{name: value for name, value in found.items() if name != "median"})

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {**asdict(self), "median": self.median}

    @property
    def over(self) -> bool:
        """Whether another run would tell nothing."""
        return self.cut is not None or bool(self.failure)


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Contenders that ran side by side."""

    name: str
    outcomes: dict[tuple[str, str], Outcome]
    #: of the machine, before each pass and after the last, in ms
    paces: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Heat:
        """What `to_json` wrote."""
        outcomes = map(Outcome.from_json, found["outcomes"])
        return cls(
            name=found["name"], outcomes={(o.shape, o.contender): o for o in outcomes}, paces=tuple(found.get("paces", ()))
        )

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        outcomes = [outcome.to_json() for outcome in self.outcomes.values()]
        return {"name": self.name, "outcomes": outcomes, "paces": self.paces}

    def median(self, shape: str, contender: str) -> float | None:
        """Of one contender; None where there is no figure."""
        found = self.outcomes.get((shape, contender))
        return found.median if found else None

    def ratio(self, shape: str, contender: str, to: str = "ours") -> Ratio | None:
        """How many times longer a contender took than another did; None where one has no figure."""
        theirs, ours = self.outcomes.get((shape, contender)), self.outcomes.get((shape, to))
        if theirs is None or ours is None or not theirs.median or not ours.median or ours.cut is not None:
            return None
        median = theirs.median / ours.median
        if theirs.cut is not None:
            return Ratio(median, median, median, bound=True)
        pairs = [a / b for a, b in zip(theirs.values, ours.values, strict=False)]
        return Ratio(median, min(pairs), max(pairs))


@dataclass(frozen=True)
class Ratio:
    """Of medians, with the least and the greatest of a repetition."""

    median: float
    least: float
    greatest: float
    #: whether it is at least this
    bound: bool = False


def pace_of(heats: Sequence[Heat]) -> str:
    """The machine's pace in words, as a sentence that follows another; empty for results that do not tell it."""
    paces = [pace for heat in heats for pace in heat.paces]
    return f" A fixed loop of Python took {min(paces):.0f} to {max(paces):.0f} ms before and after the passes." if paces else ""


def race(name: str, runners: Mapping[str, Runner], shapes: Sequence[str], *, repeats: int, budget: float) -> Heat:
    """Run a heat.

    Args:
        name: of the heat.
        runners: by their names.
        shapes: what to run, the smaller ones of a kind first: who is cut there before it has a figure of the larger is not
            asked for that.
        repeats: runs of each shape by each; one where a run is long or needs none.
        budget: seconds after which a run is cut. Ours have twenty times that, for the others are compared with them.
    """
    outcomes: dict[tuple[str, str], Outcome] = {}
    paces = [pace()]
    began = time.monotonic()
    for repeat in range(repeats):
        for shape in map(Shape.named, shapes):
            if repeat < repeats - _repeats(shape, repeats):
                continue
            names = [contender for contender in runners if contender == "ours" or not shape.is_for_ours_alone]
            turn = repeat % max(1, len(names))
            for contender in names[turn:] + names[:turn]:
                outcome = outcomes.setdefault((shape.name, contender), Outcome(shape=shape.name, contender=contender))
                smaller = outcomes.get((_smaller(shape, shapes), contender))
                if not outcome.values and smaller is not None and smaller.cut is not None:
                    outcome.cut = smaller.cut
                if outcome.over:
                    continue
                limit = max(budget, shape.size) + 30 if shape.measure != "seconds" else budget
                answer = runners[contender].ask(shape.name, 20 * limit if contender == "ours" else limit)
                outcome.record(answer, shape.measure)
                shown = f"{answer[shape.measure]:.3f}" if shape.measure in answer else str(answer)
                told = f"{time.monotonic() - began:5.0f} s  {name}: {shape.name} {contender} {shown}"
                print(told, file=sys.stderr, flush=True)
        paces.append(pace())
    return Heat(name=name, outcomes=outcomes, paces=tuple(paces))


def _repeats(shape: Shape, repeats: int) -> int:
    return 1 if shape.measure != "seconds" or shape.tasks >= LONG else repeats


def _smaller(shape: Shape, shapes: Sequence[str]) -> str:
    """The next smaller shape of the kind that is run too."""
    like = [Shape.named(name) for name in shapes]
    less = [o for o in like if o.kind == shape.kind and (o.tasks or o.size) < (shape.tasks or shape.size)]
    return max(less, key=lambda o: o.tasks or o.size).name if less else ""
