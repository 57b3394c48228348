"""What became of the rows: read, dropped by which rule, kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_SHOWN = 200  # characters of a problem


@dataclass(frozen=True)
class DroppedPrompt:
    """One row that was left out: its index in the source, its problem's first `MAX_SHOWN` characters, and why."""

    row: int
    problem: str
    why: str


@dataclass
class SourceReport:
    """Counts of one source. `unused`: rows that a mixture ended before, or that `skip` and `take` left out."""

    read: int = 0
    kept: int = 0
    unused: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[DroppedPrompt]] = field(default_factory=dict)


@dataclass
class PromptReport:
    """What `load_prompts` did, by source; printed, it is a line per source and rule.

    Of a stream the counts are those of the rows that were read so far, in the current pass over it; of a source that a
    mixture reads again (`all_exhausted`), `read` and what was dropped are those of the current reading.

    Attributes:
        examples: how many dropped rows are kept as examples, per source and rule; None: all of them.
        sources: the counts, by the source's name.
        streaming: they are of a stream, and grow as it is read.
    """

    examples: int | None = 5
    sources: dict[str, SourceReport] = field(default_factory=dict)
    streaming: bool = False

    def of(self, source: str) -> SourceReport:
        """The counts of a source, made when first asked for."""
        return self.sources.setdefault(source, SourceReport())

    def forget(self, rule: str, source: str | None = None) -> None:
        """What a rule left out of a source, or of all: a new pass over a stream begins."""
        for counts in self.sources.values() if source is None else [self.of(source)]:
            counts.dropped.pop(rule, None)
            counts.examples.pop(rule, None)

    def drop(self, source: str, rule: str, row: int, problem: str, why: str) -> None:
        """Count a row that a rule left out."""
        counts = self.of(source)
        counts.dropped[rule] += 1
        shown = counts.examples.setdefault(rule, [])
        if self.examples is None or len(shown) < self.examples:
            shown.append(DroppedPrompt(row, problem[:MAX_SHOWN], why))

    def drop_all(self, source: str, rule: str, indices: list[int], describe: Callable[[int], DroppedPrompt]) -> None:
        """Count many rows of one source at once; only those that are kept as examples are described."""
        counts = self.of(source)
        counts.dropped[rule] += len(indices)
        shown = counts.examples.setdefault(rule, [])
        room = len(indices) if self.examples is None else max(0, self.examples - len(shown))
        shown += [describe(index) for index in indices[:room]]

    @property
    def read(self) -> int:
        return sum(counts.read for counts in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(counts.kept for counts in self.sources.values())

    @property
    def dropped(self) -> Counter[str]:
        """Rows left out, by rule, over all sources."""
        total: Counter[str] = Counter()
        for counts in self.sources.values():
            total.update(counts.dropped)
        return total

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: asdict(counts) for name, counts in self.sources.items()}

    def __str__(self) -> str:
        lines = []
        for name, counts in self.sources.items():
            rules = [f"{count:,} {rule}" for rule, count in counts.dropped.items()]
            if counts.unused:
                rules.append(f"{counts.unused:,} not used")
            rules = [f"{counts.read:,} read", f"{counts.kept:,} kept", *rules]
            lines.append(f"{name}: {', '.join(rules)}" + (" (so far, of a stream)" if self.streaming else ""))
            for rule, rows in counts.examples.items():
                if rows:
                    lines.append(f"  such as row {rows[0].row} ({rule}): {rows[0].why}: {rows[0].problem[:80]!r}")
        return "\n".join(lines)
