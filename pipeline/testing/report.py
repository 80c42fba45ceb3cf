"""What a campaign found, and how a terminal shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.testing.fault import Fault, describe, to_json


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A round with violations, and how to have it again."""

    violations: tuple[str, ...]
    seed: int
    round: int
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        found = "\n".join(f"  {text}" for text in self.violations)
        return f"round {self.round} of seed {self.seed}:\n{found}\n  faults: {to_json(self.faults)}"


@dataclass(kw_only=True)
class Report:
    """Counts of a campaign; grows with each round."""

    seed: int
    kinds: Sequence[str]
    faults: Counter[str] = field(default_factory=Counter)
    executions: int = 0
    #: starts of handlers
    runs: int = 0
    #: times that a worker was replaced
    restarts: int = 0
    broken: list[Broken] = field(default_factory=list)
    #: seconds from the last fault of a round to the end of its last execution, and the round's faults
    slowest_recovery: float = 0.0
    slowest_faults: tuple[Fault, ...] = ()
    seconds: float = 0.0

    @property
    def violations(self) -> list[str]:
        """All violations."""
        return [text for broken in self.broken for text in broken.violations]

    @property
    def injected(self) -> int:
        """How many faults hit."""
        return sum(self.faults.values())

    def table(self) -> str:
        """Kinds and counts, for people."""
        width = max(len(kind) for kind in self.kinds)
        return "\n".join(f"{kind:<{width}}  {self.faults[kind]:>4}  {describe(kind)}" for kind in self.kinds)

    def summary(self) -> str:
        """One line."""
        hit = sum(1 for kind in self.kinds if self.faults[kind])
        return (
            f"faults injected: {self.injected} of {hit} kinds, executions: {self.executions},"
            f" violations: {len(self.violations)}"
        )

    def details(self) -> str:
        """The other figures."""
        kinds = ", ".join(fault.kind for fault in self.slowest_faults)
        return (
            f"handler runs: {self.runs}, workers replaced: {self.restarts}, seconds: {self.seconds:.0f}, seed: {self.seed}\n"
            f"slowest recovery: {self.slowest_recovery:.1f} s after {kinds or 'no fault'}"
        )
