"""How good the answers of an evaluation are: counts of items by group, from which every figure and
its interval follow, for a partition and for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean
from typing import Any, NamedTuple, Self

from modelcall_assets.records.outcome import BadLine, Failure, Outcome, Reason, Row, Success
from modelcall_assets.stages.report import Report
from modelcall_assets.transforms.statistics import (
    Estimate,
    centred_mean,
    majority,
    mean,
    pass_at_k,
    pass_hat_k,
    share,
)

FIGURES = "figures"
"""In the detail of a manifest."""
MANY_SUBJECTS = 10
"""So many pay for being told apart: fewer make an interval that says nothing."""
SUBJECT = "subject"
"""The column that tells it."""
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")


class Item(NamedTuple):
    """An item: of so many samples so many are right, or what they add up to; and whether the answer
    that most of them give is right."""

    task: str
    subject: str
    samples: int
    total: float
    majority: bool

    @property
    def group(self) -> str:
        return self.subject or self.task


@dataclass
class Figures:
    """`name` is the column that is averaged. Equal items are counted."""

    name: str
    is_boolean: bool = True
    items: Counter[Item] = field(default_factory=Counter[Item])
    baselines: dict[str, float] = field(default_factory=dict[str, float])
    """What guessing gives, by task; 0 where it is not named."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From its `plain` form."""
        items = Counter({Item(*item): count for *item, count in plain["items"]})
        return cls(plain["name"], plain["is_boolean"], items, dict(plain["baselines"]))

    @property
    def plain(self) -> dict[str, Any]:
        """As a manifest has it."""
        items = [[*item, count] for item, count in sorted(self.items.items())]
        own = {"name": self.name, "is_boolean": self.is_boolean, "baselines": self.baselines}
        return {**own, "items": items}

    def by(self, part: Callable[[Item], str]) -> dict[str, Figures]:
        """Parts of it, in the order of their names."""
        found: dict[str, Figures] = {}
        for item, count in sorted(self.items.items()):
            own = Figures(self.name, self.is_boolean, baselines=self.baselines)
            of = found.setdefault(part(item), own)
            of.items[item] += count
        return dict(sorted(found.items()))

    @property
    def groups(self) -> dict[str, Figures]:
        return self.by(lambda item: item.group)

    def join(self, other: Figures) -> None:
        self.items.update(other.items)
        self.baselines |= other.baselines

    def mean(self) -> Estimate:
        """Over all samples, with an interval of 95 %, clustered by item; of many subjects by
        these."""
        by_subject = len({item.subject for item in self.items} - {""}) >= MANY_SUBJECTS
        values, clusters = list[float](), list[Hashable]()
        for number, item in enumerate(self.items.elements()):
            values += [item.total / item.samples] * item.samples
            clusters += [(by_subject and item.subject) or number] * item.samples
        return (share if self.is_boolean else mean)(values, clusters)

    @property
    def figure(self) -> str:
        return "accuracy" if self.is_boolean else f"{self.name}_mean"

    def numbers(self) -> dict[str, Any]:
        """What is shown of them, by name."""
        if not self.items:
            return {}
        figure, name = self.mean(), self.figure
        found: dict[str, Any] = {"items": self.items.total(), name: figure.value}
        if isfinite(figure.low) and isfinite(figure.high):
            found |= {f"{name}_low": figure.low, f"{name}_high": figure.high}
        if self.is_boolean and any(self.baselines.values()):
            tasks = {task: each.mean().value for task, each in self.by(lambda i: i.task).items()}
            found[f"{name}_centred"] = centred_mean(tasks, self.baselines)
        most = max(item.samples for item in self.items)
        if most > 1 and self.is_boolean:
            whole = [item for item in self.items.elements() if item.samples == most]
            if len(whole) < self.items.total():
                found[f"items_with_{most}_samples"] = len(whole)
            for name, of in (("pass_at", pass_at_k), ("pass_hat", pass_hat_k)):
                found[f"{name}_{most}"] = fmean(of(most, round(i.total), most) for i in whole)
            found["majority"] = fmean(item.majority for item in whole)
        return found

    def table(self) -> Sequence[Mapping[str, Any]]:
        """For people: a row for all of it, and for each group where there are several, with four
        digits behind the point; what belongs to the figure without its name."""
        groups, own = self.groups if len(self.groups) > 1 else {}, f"{self.figure}_"
        return [
            {"group": group, **{n.removeprefix(own): round(v, 4) for n, v in of.numbers().items()}}
            for group, of in {"all": self, **groups}.items()
        ]

    def tell(self, report: Report) -> None:
        """Before all else: it is what people look for. Means of the same name are of all rows."""
        numbers = self.numbers()
        report.numbers = numbers | report.numbers | numbers
        report.tables[FIGURES] = self.table() if self.items else []


def joined(rows: Iterable[Row | None]) -> Figures | None:
    """Of the accepted results among some lines of the summary; None where none has figures."""
    plain = (row[FIGURES] for row in rows if row and row["accepted"])
    found = [*map(Figures.of, filter(None, plain))]
    for other in found[1:]:
        found[0].join(other)
    return found[0] if found else None


class Grades:
    """Those of items, whose samples come one after another."""

    def __init__(self, name: str, is_boolean: bool) -> None:
        self._figures, self._of, self._sample = Figures(name, is_boolean), ("", "", ""), -1
        self._samples = list[tuple[str, float]]()
        """Answer and value of each of the item."""

    def checked(self, outcome: Success) -> Outcome:
        """A Failure where the grader says nothing of what is averaged."""
        if (name := self._figures.name) in outcome.values:
            return outcome
        told = f"score() returned {', '.join(outcome.values)}; expected {name}, which is averaged"
        return Failure(Reason.SCORER_ERROR, told)

    def add(self, item: Row | BadLine, values: Mapping[str, Any]) -> None:
        """The grade of the next row."""
        row = {} if isinstance(item, BadLine) else item
        of = tuple(str(row.get(name) or "") for name in ("api_record_id", "task", SUBJECT))
        sample = row.get("sample") or 0
        if of != self._of or sample <= self._sample:
            self._end_item()
            self._of = of
            if 0 < (baseline := row.get("baseline") or 0) < 1:
                self._figures.baselines[of[1]] = baseline
        self._sample = sample
        value = values.get(self._figures.name)
        if value is not None and isfinite(value := float(value)):
            self._samples.append((str(values.get("answer", value)), value))

    def tell(self, report: Report) -> None:
        """All are graded."""
        self._end_item()
        report.detail[FIGURES] = self._figures.plain
        self._figures.tell(report)

    def _end_item(self) -> None:
        if self._samples:
            _, task, subject = self._of
            total, (_, most_say) = sum(value for _, value in self._samples), majority(self._samples)
            item = Item(task, subject, len(self._samples), total, bool(most_say))
            self._figures.items[item] += 1
        self._samples = []
