"""The runner: a check first, then all contenders of a case; one row after the other, each saved at once.

A contender that is absent, fails or runs out of memory gets a status and its reason; the run goes on. A case
where ours is wrong gets no time, and a baseline that is wrong gets none either.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from camtl.bench._row import Row, finish, floors, mark, new_row, noise
from camtl.bench.case import Case, Contender, Inputs, Step
from camtl.bench.clock import (
    Clock,
    CpuClock,
    CudaClock,
    Deadline,
    clock_for,
    outcome,
    quantiles,
    tidy,
)
from camtl.bench.record import Record, new_path
from camtl.bench.start_up import start_up

# Seconds: on a CPU for all rounds of a pass, on a GPU for each measurement.
BUDGETS = {
    "cpu": {"smoke": 0.0, "quick": 1.4, "paper": 2.0, "full": 2.0},
    "cuda": {"smoke": 0.0, "quick": 0.12, "paper": 0.3, "full": 0.3},
}
AGAIN = ", again"  # behind the name of a contender that is timed twice, to see what noise there is


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        done: rows, with fractions.
        total: rows.
        id: the row that is measured.
        doing: what with it.
        left: seconds until the end, estimated; None: not known yet.
        row: the row, when it is complete.
    """

    done: float
    total: int
    id: str
    doing: str
    left: float | None
    row: Row | None = None


def run(
    cases: Iterable[Case],
    *,
    record: Record | None = None,
    section: str = "all",
    shapes: str = "quick",
    seconds: float | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Record:
    """Measure cases.

    Args:
        cases: all of one device.
        record: is added to; None: a new one of this machine.
        section: of a new record: ``"ops"``, ``"model"`` or ``"all"``.
        shapes: of a new record; also how long is measured: ``"smoke"`` not seriously, ``"paper"``
            and ``"full"`` longer than ``"quick"``.
        seconds: nothing new begins after so long; None: there is no hurry.
        output: file or folder of a new record; None: nothing is written.
        progress: hears what is done.

    Returns:
        The record: ``record.content`` is its content, and ``record.path`` its file.

    Raises:
        ValueError: there are no cases, or they are of several devices.
        UsageError: the file exists already.
        KeyboardInterrupt: was pressed; the record has, and its file holds, what was measured until then.
    """
    cases = list(cases)
    devices = {case.device for case in cases}
    if len(devices) != 1:
        raise ValueError(f"a run measures cases of one device, not of {', '.join(sorted(devices)) or 'none'}")
    (device,) = devices
    if record is None:
        path = None if output is None else new_path(section, shapes, device, output)
        record = Record.create(section, shapes, device, path)
    return Runner(record, clock_for(device), seconds=seconds, progress=progress).run(cases)


class Runner:
    """One run: its clock, its record, its time."""

    def __init__(
        self,
        record: Record,
        clock: Clock,
        *,
        seconds: float | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.record, self.clock, self.heard = record, clock, progress
        self.shapes: str = record.content["shapes"]
        self.smoke = self.shapes == "smoke"
        self.deadline, self.start = Deadline(seconds), time.monotonic()
        self.number, self.total, self.id = 0, 0, ""
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.ceilings: dict[str, list[float]] = {}
        self.ratios: list[float] = []  # of contenders to themselves
        self.seen: set[str] = set()  # ops that have such a ratio

    def run(self, cases: Sequence[Case]) -> Record:
        """Measure all; see :func:`run`."""
        content, self.total = self.record.content, len(cases)
        self.record.save()  # whether it can be written is better known now
        why = "stopped by an error"
        try:
            self._ceilings()
            if self.total > 1 and not (self.smoke or content["start_up"]):
                self._say("how long a start takes")
                content["start_up"] = start_up(self.clock.device)
            for self.number, case in enumerate(cases):
                if self.deadline.left <= 0:
                    why = f"no time left for {self.total - self.number} of {self.total} rows"
                    break
                if self.clock.device == "cpu" and self.number:
                    self._ceilings()
                self._case(case)
            else:
                cut = sum(row["status"] == "interrupted" for row in content["rows"])
                why = f"no time left in {cut} of {self.total} rows" if cut else ""
        except KeyboardInterrupt:
            why = "stopped by hand"
            raise
        finally:
            for row in content["rows"]:
                floors(row, content["ceilings"])  # as they are now
            content["finished"], content["why"] = not why, why
            content["seconds"] = round(time.monotonic() - self.start, 1)
            content["noise"] = noise(self.ratios)
            self.record.save()
        return self.record

    def _ceilings(self) -> None:
        """What this machine can do: medians over the run, for a busy machine's speed comes and goes."""
        self._say("what this machine can do")
        for name, value in self.clock.ceilings(self.smoke).items():
            self.ceilings.setdefault(name, []).append(value)
            self.record.content["ceilings"][name] = statistics.median(self.ceilings[name])

    def _say(self, doing: str, share: float = 0.0, row: Row | None = None) -> None:
        """Tell how far it is: ``share`` of the current row."""
        if self.heard is None:
            return
        done, taken = self.number + share, time.monotonic() - self.start
        left = taken / done * (self.total - done) if done else None
        if self.deadline.left < (left or 0.0):
            left = max(0.0, self.deadline.left)
        self.heard(Progress(done, self.total, self.id, doing, left, row))

    # -- a case

    def _case(self, case: Case) -> None:
        """Measure, and add the row, whatever happens."""
        self.id, self.samples = case.id, {}
        row = new_row(case)
        try:
            self._say("starting")
            _fresh()
            contenders = case.contenders()
            row = new_row(case, contenders)
            self._measure(case, contenders, row)
        except KeyboardInterrupt as error:
            row["status"], row["why"] = outcome(error)
            finish(row, self.record.content["ceilings"], self.samples)
            if any(e["ms"] for part in row["passes"].values() for e in part["contenders"].values()):
                self.record.add(row)
            raise
        except Exception as error:  # the case itself: its inputs, its list of contenders
            row["status"], row["why"] = outcome(error)
        finish(row, self.record.content["ceilings"], self.samples)
        self.record.add(row)
        self._say("done", 1.0, row)

    def _measure(self, case: Case, contenders: Sequence[Contender], row: Row) -> None:
        inputs = case.inputs()
        present = [c for c in contenders if not c.absent]
        usable = self._checked(case, present, inputs, row)
        if any(c.kind == "ours" for c in contenders) and not any(c.kind == "ours" for c in usable):
            return
        if row["status"] == "wrong":
            return
        if isinstance(self.clock, CpuClock):
            self._on_cpu(self.clock, case, usable, inputs, row)
        else:
            self._on_gpu(self.clock, case, usable, inputs, row)

    def _checked(self, case: Case, present: Sequence[Contender], inputs: Inputs, row: Row) -> list[Contender]:
        """The contenders that may be timed: those whose results are right, so that all do the same work.

        Where one of ours is wrong, the row's status says so.
        """
        usable = []
        for contender in present:
            if case.check is not None:
                self._say(f"checking {contender.name}")
                ours = contender.kind == "ours"
                try:
                    self.deadline.check()
                    reasons = case.check(contender, _inputs_of(contender, inputs) if ours else inputs)
                except Exception as error:
                    status, why = outcome(error)
                    mark(row, contender.name, (status, f"in the check: {why}"))
                    continue
                finally:
                    tidy()
                if reasons:
                    mark(row, contender.name, ("wrong", "; ".join(reasons)))
                    if ours:
                        row["status"] = "wrong"
                        row["why"] = "; ".join(
                            filter(None, [row["why"], f"{contender.name}: {'; '.join(reasons)}"])
                        )
                    continue
            usable.append(contender)
        return usable

    def _budget(self, measurements: int) -> float:
        """Seconds for one of so many measurements of a row, less where the run would not reach its end."""
        usual = BUDGETS[self.clock.device].get(self.shapes, 0.8)
        fair = 0.5 * max(0.0, self.deadline.left) / (self.total - self.number)
        return min(usual, fair / max(1, measurements))

    def _twice(self, case: Case, usable: Sequence[Contender]) -> str | None:
        """The contender of ours that is timed once more in this row: in the first row of each op."""
        ours = [c.name for c in usable if c.kind == "ours"]
        if not ours or (case.section + case.op) in self.seen:
            return None
        self.seen.add(case.section + case.op)
        return ours[0]

    # -- on a CPU: prepared one after the other, timed in turns

    def _on_cpu(
        self, clock: CpuClock, case: Case, usable: Sequence[Contender], inputs: Inputs, row: Row
    ) -> None:
        steps: dict[str, dict[str, Step]] = {name: {} for name in case.passes}
        for number, contender in enumerate(usable):
            self._say(f"preparing {contender.name}", 0.5 * number / len(usable))
            self._prepare(contender, inputs, steps, row)
        alone = {c.name for c in usable if not c.paired}
        twice, last = self._twice(case, usable), case.passes[-1]
        least = 2 if self.smoke else 5
        for number, (name, found) in enumerate(steps.items()):
            self._say(f"timing {name}", 0.5 + 0.5 * number / len(steps))
            budget = self._budget(len(steps))
            together = {n: step for n, step in found.items() if n not in alone}
            if name == last and twice in together:
                together[f"{twice}{AGAIN}"] = together[twice]
            groups = [together, *({n: found[n]} for n in found if n in alone)]
            for group in filter(None, groups):
                times, gone = clock.in_turns(
                    group, budget if group is together else budget / 3, least=least, deadline=self.deadline
                )
                again = times.pop(f"{twice}{AGAIN}", None)
                if again and twice in times:
                    self.ratios.append(
                        statistics.median(b / a for b, a in zip(again, times[twice], strict=True))
                    )
                for who, taken in times.items():
                    row["passes"][name]["contenders"][who] |= {
                        "status": "ok",
                        "why": "",
                        "ms": quantiles(taken),
                    }
                for who, what in gone.items():
                    if not who.endswith(AGAIN):
                        mark(row, who, what, only=name)
                if group is together:
                    self.samples[name] = times

    def _prepare(
        self, contender: Contender, inputs: Inputs, steps: dict[str, dict[str, Step]], row: Row
    ) -> None:
        """Make a contender's steps and call each once, which compiles what it compiles."""
        try:
            self.deadline.check()
            made = contender.make(_inputs_of(contender, inputs))
        except Exception as error:
            mark(row, contender.name, outcome(error))
            return
        for name, found in steps.items():
            if name not in made:
                mark(row, contender.name, ("absent", "it has no such pass"), only=name)
                continue
            try:
                made[name]()
                found[contender.name] = made[name]
            except Exception as error:
                mark(row, contender.name, outcome(error), only=name)

    # -- on a GPU: one after the other, so that each has the memory for itself

    def _on_gpu(
        self, clock: CudaClock, case: Case, usable: Sequence[Contender], inputs: Inputs, row: Row
    ) -> None:
        budget = self._budget(3 * len(usable) * len(case.passes))
        for number, contender in enumerate(usable):
            self._say(contender.name, number / len(usable))
            self._contender(clock, case, contender, inputs, row, budget)
        twice, last = self._twice(case, usable), case.passes[-1]
        first = row["passes"][last]["contenders"][twice] if twice else {}
        if first.get("ms") and self.deadline.left > 0:
            self._say(f"{twice}, once more", 0.95)
            (contender,) = (c for c in usable if c.name == twice)
            spare = new_row(case, [contender])
            self._contender(clock, case, contender, inputs, spare, budget, only=last)
            second = spare["passes"][last]["contenders"][twice]
            times = "graph_ms" if first["graph_ms"] and second["graph_ms"] else "ms"
            if second[times]:
                self.ratios.append(second[times]["p50"] / first[times]["p50"])

    def _contender(
        self,
        clock: CudaClock,
        case: Case,
        contender: Contender,
        inputs: Inputs,
        row: Row,
        budget: float,
        only: str | None = None,
    ) -> None:
        """All that is measured of a contender; where copies of its inputs do not fit, without them."""
        found = "", ""
        for rotate in (True, False):
            try:
                self.deadline.check()
                self._timed(clock, case, contender, inputs, row, budget, rotate, only)
                return
            except Exception as error:
                found = outcome(error)
            finally:
                tidy()
            if found[0] != "out of memory":
                break
        mark(row, contender.name, found)

    def _timed(
        self,
        clock: CudaClock,
        case: Case,
        contender: Contender,
        inputs: Inputs,
        row: Row,
        budget: float,
        rotate: bool,
        only: str | None,
    ) -> None:
        own = _inputs_of(contender, inputs)
        made = [contender.make(x) for x in (clock.rotated(own) if rotate else [own])]
        for name in case.passes if only is None else (only,):
            if name in made[0]:
                found = clock.measured(
                    [m[name] for m in made],
                    budget,
                    graph=contender.graph,
                    least=1 if name == "step" else 16,
                    grad=name != "forward",
                )
                row["passes"][name]["contenders"][contender.name] |= {"status": "ok"} | found
            else:
                mark(row, contender.name, ("absent", "it has no such pass"), only=name)


def _inputs_of(contender: Contender, inputs: Inputs) -> Inputs:
    if contender.inputs is None:
        return inputs
    torch.manual_seed(0)
    return contender.inputs()


def _fresh() -> None:
    """No case inherits what another left behind: memory, compiled code, the generator's state."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    tidy()
    torch.manual_seed(0)
