"""Completions of a whole set of prompts, drawn in batches and judged behind the firewall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data import EncodedPrompt, PromptEncoder
from ..partial_file import PartialFile, rows_hash
from ..rewards import AccuracyReward, Limits, RewardScorer
from ..rewards.text import completion_text
from ..rollout import GroupSampler
from ..side_by_side import LoadedPolicy, speaking_as
from .judged import Judged
from .settings import Settings
from .votes import SameAnswer, extract_answers, undecided_pairs, vote

RewardFunc = Callable[..., Any]


class Judge:
    """Draws completions of all rows, and has them judged behind the firewall."""

    def __init__(
        self,
        rows: Dataset,
        encoder: PromptEncoder,
        encoded: Sequence[EncodedPrompt],
        how: Settings,
        reward: RewardFunc,
        format_reward: RewardFunc | None,
        limits: Limits | None,
        failures_file: str | Path | None,
    ) -> None:
        self._rows, self._encoder, self._encoded, self._how = rows, encoder, encoded, how
        functions = [reward] if format_reward is None else [reward, format_reward]
        file = None if failures_file is None else Path(failures_file)
        self._scorer = RewardScorer(functions, limits=limits, failures_file=file)
        exact = reward if isinstance(reward, AccuracyReward) else AccuracyReward()
        self._extract_from = exact.extract_from
        self._same = RewardScorer(SameAnswer(exact.compare), limits=limits, max_failure_rate=1.0, failures_file=file)
        self._failed: dict[str, int] = {}
        self._undecided: dict[str, int] = {}
        self._file: PartialFile | None = None
        self.seconds = 0.0  # of sampling and judging, those of an interrupted evaluation too
        self.names = self._scorer.names
        self.format_name = None if format_reward is None else self.names[1]

    def close(self) -> None:
        self._scorer.close()
        self._same.close()

    def go_on(self, file: Path, model: dict[str, Any]) -> None:
        """Keep what is done in a file, and begin with what it has of this evaluation already.

        Raises:
            ValueError: it is of another one.
        """
        drawn = ("num_generations", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
        what = {
            **model,
            **{name: getattr(self._how, name) for name in drawn},
            "rows": len(self._rows),
            "rows_hash": rows_hash(self._rows, self._encoded),
            "rewards": list(self.names),
            "votes": self._votes,
        }
        self._file = PartialFile(file, what, "an evaluation")

    def sample(self, sampler: GroupSampler, policy: LoadedPolicy, who: str, progress: bool) -> list[list[Judged]]:
        """P groups of G judged completions."""
        groups = self._done(who)
        with _progress_bar(progress) as bar:
            task = bar.add_task(who, total=len(self._rows), completed=len(groups))
            left = [number for number in range(len(self._rows)) if number not in groups]
            size = max(1, self._how.batch_size // self._how.num_generations)
            for start in range(0, len(left), size):
                some = left[start : start + size]
                started, failed, undecided = time.perf_counter(), self._failed[who], self._undecided[who]
                judged = self._judge(sampler, policy, who, some)
                seconds = time.perf_counter() - started
                self.seconds += seconds
                groups |= dict(zip(some, judged, strict=True))
                if self._file is not None:
                    counts = {"failed": self._failed[who] - failed, "undecided": self._undecided[who] - undecided}
                    all_of_it = [[asdict(one) for one in group] for group in judged]
                    self._file.add([{"groups": all_of_it, "seconds": seconds, **counts}])
                bar.advance(task, len(some))
        return [groups[number] for number in range(len(self._rows))]

    def _done(self, who: str) -> dict[int, list[Judged]]:
        """What an interrupted evaluation has of this policy, by row."""
        self._failed[who] = self._undecided[who] = 0
        groups: dict[int, list[Judged]] = {}
        for batch in () if self._file is None else self._file.done:
            judged = [[Judged(**one) for one in group] for group in batch["groups"]]
            if judged[0][0].policy == who:
                groups |= {group[0].prompt_index: group for group in judged}
                self._failed[who] += batch["failed"]
                self._undecided[who] += batch["undecided"]
                self.seconds += batch["seconds"]
        return groups

    @property
    def _votes(self) -> bool:
        """Whether answers are compared with each other: maj@1 needs none."""
        return any(k > 1 for k in self._how.ks)

    def _judge(self, sampler: GroupSampler, policy: LoadedPolicy, who: str, some: Sequence[int]) -> list[list[Judged]]:
        many = self._how.num_generations
        rows, encoded = self._rows.select(some).to_list(), [self._encoded[number] for number in some]
        with speaking_as(who, policy.model):
            drawn = sampler.generate([prompt.ids for prompt in encoded], many, seed=self._how.seed, prompt_indices=some)
        repeated = [row for row in rows for _ in range(many)]
        prompts = [row["prompt"] for row in repeated]
        prefills = [prompt.prefill for prompt in encoded for _ in range(many)]
        completions = self._encoder.completions(prompts, prefills, drawn.completion_ids)
        scores = self._scorer.score(
            prompts,
            completions,
            drawn.completion_ids,
            {name: [row[name] for row in repeated] for name in sorted(set(rows[0]) - {"prompt", "completion"})},
            step=0,
            prefills=prefills,
        )
        self._scorer.pop_logged()
        self._failed[who] += int(scores.failed[:, 0].sum())
        logps = drawn.logps.sum(dim=1, dtype=torch.float64).tolist()
        texts = [completion_text(completion) for completion in completions]
        judged = [
            Judged(
                policy=who,
                prompt_index=some[number // many],
                completion_index=number % many,
                completion=text,
                tokens=drawn.lengths[number],
                finish_reason=drawn.finish_reasons[number],
                logp=logps[number],
                reward=_or_none(scores.rewards[number, 0]),
                format_reward=None if self.format_name is None else _or_none(scores.rewards[number, 1]),
                answer=answer,
            )
            for number, (text, answer) in enumerate(zip(texts, extract_answers(texts, self._extract_from), strict=True))
        ]
        groups = [judged[start : start + many] for start in range(0, len(judged), many)]
        if self._votes:
            self._vote(groups, who)
        return groups

    def _vote(self, groups: Sequence[list[Judged]], who: str) -> None:
        """Number the answers of each prompt."""
        pairs = sorted({pair for group in groups for pair in undecided_pairs([one.answer for one in group])})
        same = set()
        if pairs:
            nothing: list[Any] = [""] * len(pairs)
            found = self._same.score(
                nothing, [b for _, b in pairs], [[]] * len(pairs), {"other": [a for a, _ in pairs]}, step=0
            )
            same = {pair for pair, value in zip(pairs, found.rewards[:, 0].tolist(), strict=True) if value == 1.0}
            self._undecided[who] += int(found.failed.sum())
        for group in groups:
            for one, number in zip(group, vote([one.answer for one in group], same), strict=True):
                one.vote = number

    def counts(self, groups: Sequence[Sequence[Judged]]) -> dict[str, int]:
        """What was drawn, and what of it was not judged."""
        everything = [one for group in groups for one in group]
        who = everything[0].policy
        return {
            "completions": len(everything),
            "without_reward": sum(one.reward is None for one in everything),
            "reward_failed": self._failed[who],
            "comparisons_failed": self._undecided[who],
        }

    def as_dataset(self, found: dict[str, list[list[Judged]]]) -> Dataset:
        """A row per completion. A column of the dataset with a name of ours gets `data_` in front."""
        everything = [one for groups in found.values() for group in groups for one in group]
        ours = {name: [getattr(one, name) for one in everything] for name in (*Judged.__dataclass_fields__, "right")}
        texts = [self._encoder.text(prompt) for prompt in self._rows["prompt"][:]]
        columns: dict[str, list[Any]] = {"prompt": [texts[one.prompt_index] for one in everything], **ours}
        for name in self._rows.column_names:
            if name != "prompt":
                values = self._rows[name][:]
                columns[f"data_{name}" if name in columns else name] = [values[one.prompt_index] for one in everything]
        return Dataset.from_dict(columns)


def _or_none(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
