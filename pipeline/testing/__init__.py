"""The crash kit: proves on real processes that nothing is lost, also for workflows and handlers of your own.

Faults come from outside (signals, cut lines, killed servers, lost and forged messages) or strike at one transition
inside a worker. After each round everything is checked against a ledger that the engine does not write.
"""

from __future__ import annotations

from pipeline.testing.checks import Record
from pipeline.testing.fault import Fault
from pipeline.testing.kit import CrashKit
from pipeline.testing.report import Report

__all__ = ["CrashKit", "Fault", "Record", "Report"]
