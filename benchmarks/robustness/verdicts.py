"""Verdicts about cases, counted in one table; and running many cases on all cores.

A case is good if what happened is one of the good outcomes of its part. Everything else is WRONG, and is shown.
"""

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import click

T = TypeVar("T")

EXAMPLES = 3  # of each kind of wrong outcome that are shown in full


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happened in one case."""

    part: str  # kills, processes, damage, fuzz, full-disk or writers
    what: str  # the row of the table
    outcome: str  # in words
    wrong: bool = False
    case: str = ""  # what was done, so that it can be done again
    detail: str = ""  # for a wrong one: commands and what they printed


class Tally:
    """Counts verdicts, and shows the wrong ones as they come in."""

    def __init__(self) -> None:
        self.wrong: list[Verdict] = []
        self._rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._wrong: Counter[tuple[str, str]] = Counter()
        self._shown: Counter[tuple[str, str, str]] = Counter()

    def add(self, verdict: Verdict) -> None:
        """Count a verdict."""
        row = (verdict.part, verdict.what)
        self._rows[row][verdict.outcome if not verdict.wrong else "WRONG"] += 1
        if verdict.wrong:
            self.wrong.append(verdict)
            self._wrong[row] += 1
            kind = (*row, verdict.outcome)
            self._shown[kind] += 1
            if self._shown[kind] <= EXAMPLES:
                click.echo(_in_full(verdict), err=True)

    def count(self, part: str, what: str) -> int:
        """Return how many verdicts a row has."""
        return sum(self._rows[part, what].values())

    def table(self) -> str:
        """Return the table, in Markdown."""
        lines = ["| part | what | cases | as it should be | wrong |", "|---|---|---|---|---|"]
        for (part, what), counts in self._rows.items():
            good = ", ".join(f"{count:,} {name}" for name, count in counts.most_common() if name != "WRONG")
            total, wrong = sum(counts.values()), self._wrong[part, what]
            lines.append(f"| {part} | {what} | {total:,} | {good or 'none'} | {f'**{wrong:,}**' if wrong else 0} |")
        total, wrong = sum(sum(counts.values()) for counts in self._rows.values()), len(self.wrong)
        return "\n".join([*lines, f"| all | | {total:,} | {total - wrong:,} | {wrong:,} |"])

    def summary(self) -> str:
        """Return the kinds of wrong outcomes with their counts, one a line; "" without any."""
        kinds = Counter((verdict.part, verdict.what, verdict.outcome) for verdict in self.wrong)
        return "\n".join(f"{count:6,} {' | '.join(kind)}" for kind, count in kinds.most_common())

    def to_json(self) -> list[dict[str, Any]]:
        """Return the wrong verdicts."""
        return [asdict(verdict) for verdict in self.wrong]


def run_cases(run: Callable[[int], T], cases: Iterable[int], jobs: int) -> Iterator[T]:
    """Yield what `run` returns for each case, in any order; `jobs` forked processes share the work."""
    with multiprocessing.get_context("fork").Pool(jobs, _remember, (run,)) as pool:
        yield from pool.imap_unordered(_call, cases)


_run: Callable[[int], Any]


def _remember(run: Callable[[int], Any]) -> None:
    """Keep in a worker what it is to run: a closure, which could not be sent to it."""
    global _run
    _run = run


def _call(case: int) -> Any:
    return _run(case)


def _in_full(verdict: Verdict) -> str:
    return f"\nWRONG  {verdict.part} | {verdict.what} | {verdict.outcome}\n{verdict.case}\n{verdict.detail}"
