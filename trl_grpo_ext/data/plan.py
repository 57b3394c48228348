"""What `load_prompts` is to do with each source: its arguments checked, its rows opened, its columns found."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .opening import declaration, open_rows
from .overlap import Contamination
from .report import PromptReport
from .rows import Columns, Preparation, features_of, find_columns, problem_columns
from .screens import DEDUPLICATE, PassRateBand, TokenLimit, Unreadable
from .sources import Location, Source, locate
from .steps import Screen, apply_screen, map_rows
from .templates import Prompter, make_prompter

STOPPING = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
UNREADABLE = ("error", "drop")
SHUFFLE_BUFFER = 10_000
_CHOICE = ("shuffle", "skip", "take")
_OF_EVALUATION = ("split", "config", "columns")  # what overrides may say of a source that only `decontaminate` names


@dataclass(frozen=True)
class Choice:
    """Which rows are used: `skip` and `take` of them, after a shuffle."""

    shuffle: bool = False
    seed: int = 0
    skip: int = 0
    take: int | None = None

    def of(self, rows: Any) -> Any:
        """Those rows."""
        if self.shuffle:
            stream = {"buffer_size": SHUFFLE_BUFFER} if isinstance(rows, IterableDataset) else {}
            rows = rows.shuffle(seed=self.seed, **stream)
        if isinstance(rows, IterableDataset):
            rows = rows.skip(self.skip) if self.skip else rows
            return rows if self.take is None else rows.take(self.take)
        if not self.skip and self.take is None:
            return rows
        end = len(rows) if self.take is None else min(len(rows), self.skip + self.take)
        return rows.select(range(self.skip, end) if self.skip < end else [])


@dataclass
class SourcePlan:
    """One source: where its rows are, and what is done with them before they are mixed."""

    name: str
    weight: float | None
    declared: Source
    rows: Dataset | IterableDataset
    columns: Columns
    prompter: Prompter
    arguments: Mapping[str, Any]
    deduplicate: str

    def prepare(
        self,
        sources: Sequence[SourcePlan],
        tokenizer: PreTrainedTokenizerBase | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        report: PromptReport,
    ) -> Any:
        """The source's prompts, but for duplicates; with the columns of all `sources`."""
        streaming = isinstance(self.rows, IterableDataset)
        features = shared_features(sources)
        preparation = Preparation(
            self.name,
            self.declared,
            self.columns,
            self.prompter,
            tuple(features),
            self.deduplicate,
            self.arguments["unreadable"] == "drop",
            report if streaming else None,
        )
        rows = map_rows(self.rows, preparation, preparation.key, Features(features), f"prompts of {self.name}")
        report.of(self.name)
        if not streaming:
            report.of(self.name).read = len(rows)
        for screen in self._screens(tokenizer, chat_template_kwargs):
            rows = apply_screen(rows, screen, report, self.name)
        choice = {key: self.arguments[key] for key in (*_CHOICE, "seed") if key in self.arguments}
        return Choice(**choice).of(rows)

    def _screens(
        self, tokenizer: PreTrainedTokenizerBase | None, chat_template_kwargs: Mapping[str, Any] | None
    ) -> list[Screen]:
        screens: list[Screen] = [Unreadable()] if self.arguments["unreadable"] == "drop" else []
        if self.arguments["pass_rate"] is not None:
            if all(key != "pass_rate" for key, _, _ in self.columns.extra):
                raise ValueError(
                    f"pass_rate: source={self.name!r} has no column 'pass_rate'. Measure it with `trl-grpo difficulty`"
                    ", or name its column: columns={'pass_rate': ...}."
                )
            screens.append(PassRateBand(*self.arguments["pass_rate"]))
        limit = self.arguments["max_prompt_tokens"]
        if limit is not None:
            if tokenizer is None:
                raise ValueError(
                    f"max_prompt_tokens={limit} needs a tokenizer to count with: tokenizer=AutoTokenizer."
                    "from_pretrained(model)."
                )
            if self.prompter.conversational and tokenizer.chat_template is None:
                raise ValueError(
                    f"max_prompt_tokens={limit}: the tokenizer has no chat template, and template="
                    f"{self.arguments['template']!r} makes conversations. Use an instruct model's, or 'r1-zero'."
                )
            screens.append(TokenLimit(limit, tokenizer, chat_template_kwargs))
        if self.arguments["decontaminate"]:
            screens.append(contamination_of(self.arguments))
        return screens


def check_arguments(
    deduplicate: str, stopping_strategy: str, tokenizer: PreTrainedTokenizerBase | None, whole: Choice
) -> None:
    """Refuse what concerns no single source.

    Raises:
        TypeError: for a tokenizer that is none.
        ValueError: names the argument, its value and the rule.
    """
    for name, value, known in (
        ("deduplicate", deduplicate, DEDUPLICATE),
        ("stopping_strategy", stopping_strategy, STOPPING),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")
    if tokenizer is not None and not hasattr(tokenizer, "apply_chat_template"):
        raise TypeError(f"tokenizer={tokenizer!r:.80} must be a tokenizer: AutoTokenizer.from_pretrained(model).")
    _check_choice(whole.skip, whole.take, whole.seed, "")


def plan_sources(
    source: Any,
    own: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None,
    streaming: bool,
    deduplicate: str,
) -> list[SourcePlan]:
    """The sources, each with its arguments, its rows opened and its columns found.

    Raises:
        ValueError: there is none, one is unknown or given twice, or its arguments do not fit.
    """
    weights = _weights(source)
    given = _overrides(overrides, weights, own)
    located = {name: locate(name) for name in weights}  # all names, before anything is read
    against = {name: values for name, values in given.items() if name not in weights}
    plans = [
        _plan(
            where,
            weights[name],
            {**own, **given.get(name, {}), "decontaminate_overrides": against},
            streaming,
            deduplicate,
        )
        for name, where in located.items()
    ]
    forms = {plan.prompter.conversational for plan in plans}
    if len(forms) > 1:
        names = [(plan.name, plan.arguments["template"]) for plan in plans]
        raise ValueError(
            f"template: {names} make messages of some prompts and plain text of others, which cannot be one data set. "
            "Give all sources templates of one form."
        )
    return plans


def shared_features(sources: Sequence[SourcePlan]) -> dict[str, Any]:
    """The columns of all sources, by name.

    Raises:
        ValueError: two sources keep different kinds of value under one name.
    """
    features: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for plan in sources:
        for name, feature in features_of(plan.columns, plan.prompter.conversational).items():
            if features.setdefault(name, feature) != feature:
                raise ValueError(
                    f"the column {name!r} is {features[name]} in {owner[name]!r} and {feature} in {plan.name!r}: keep "
                    "one of them under another name, with columns={'other_name': column} in overrides."
                )
            owner.setdefault(name, plan.name)
    return features


def contamination_of(arguments: Mapping[str, Any]) -> Contamination:
    """The problems of the evaluation sources. Their gold answers need not be there.

    Raises:
        ValueError: a source cannot be read, or has no problems.
    """
    found = Contamination(arguments["decontaminate_ngram"], arguments["decontaminate_share"])
    for name in map(os.fspath, arguments["decontaminate"]):
        where = locate(name)
        declared = declaration(where)
        given = arguments["decontaminate_overrides"].get(name, {})
        split = given.get("split", declared.evaluation_split)
        rows = open_rows(where, split, given.get("config"), arguments["seed"], streaming=False)
        try:
            columns = problem_columns(name, declared, rows.features, given.get("columns"))
        except ValueError as error:
            raise ValueError(
                f"decontaminate: {error} Of a source to decontaminate against: overrides={{{name!r}: {{'columns': "
                "{'problem': 'its column'}}}."
            ) from error
        preparation = Preparation(name, declared, columns, make_prompter("plain"), ("problem",), "off", False, None)
        features = Features({"problem": Value("string")})
        found.add(name, map_rows(rows, preparation, preparation.key, features, f"problems of {name}")["problem"])
    return found


def _plan(
    where: Location, weight: float | None, arguments: dict[str, Any], streaming: bool, deduplicate: str
) -> SourcePlan:
    _check_source_arguments(where.name, arguments)
    prompter = make_prompter(arguments["template"], arguments["system_prompt"], arguments["few_shot"])
    declared = declaration(where)
    rows = open_rows(where, arguments["split"], arguments["config"], arguments["seed"], streaming)
    features = rows.features
    if features is None:  # a stream's are known once it is read
        rows = rows._resolve_features()
        features = rows.features
    if not features:
        raise ValueError(f"source={where.name!r} has no rows. Check the file, or the split {arguments['split']!r}.")
    columns = find_columns(where.name, declared, features, arguments["columns"], arguments["answer"])
    return SourcePlan(where.name, weight, declared, rows, columns, prompter, arguments, deduplicate)


def _check_source_arguments(name: str, arguments: dict[str, Any]) -> None:
    limit, ngram = arguments["max_prompt_tokens"], arguments["decontaminate_ngram"]
    share, band = arguments["decontaminate_share"], arguments["pass_rate"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"max_prompt_tokens={limit!r} must be a whole number of at least 1, or None for no limit.")
    if isinstance(ngram, bool) or not isinstance(ngram, int) or ngram < 1:
        raise ValueError(f"decontaminate_ngram={ngram!r} must be a whole number of at least 1; usual are 8 to 13.")
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"decontaminate_share={share!r} must be within 0..1.")
    if isinstance(arguments["decontaminate"], str):
        raise ValueError(f"decontaminate={arguments['decontaminate']!r} must be a list of sources: put it in brackets.")
    if not isinstance(arguments["decontaminate"] or (), Sequence):
        raise TypeError(f"decontaminate={arguments['decontaminate']!r:.80} must be a list of sources.")
    for other in arguments["decontaminate"] or ():
        if not isinstance(other, (str, os.PathLike)):
            raise TypeError(f"decontaminate has {other!r:.80}: it must be a list of sources, by name, id or file.")
    if arguments["unreadable"] not in UNREADABLE:
        raise ValueError(f"unreadable={arguments['unreadable']!r} must be one of {', '.join(UNREADABLE)}.")
    rates = band if isinstance(band, Sequence) and all(isinstance(rate, (int, float)) for rate in band) else ()
    if band is not None and (len(rates) != 2 or not 0 <= rates[0] <= rates[1] <= 1):
        raise ValueError(f"pass_rate={band!r} must be two numbers, 0 <= lowest <= highest <= 1.")
    for key in ("split", "config"):
        if not isinstance(arguments[key], str) and (key == "split" or arguments[key] is not None):
            raise ValueError(f"{key}={arguments[key]!r} of source={name!r} must be text.")
    _check_choice(arguments.get("skip", 0), arguments.get("take"), arguments["seed"], f" of source={name!r}")


def _check_choice(skip: Any, take: Any, seed: Any, where: str) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r}{where} must be a whole number of at least 0.")
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise ValueError(f"skip={skip!r}{where} must be a whole number of at least 0.")
    if take is not None and (isinstance(take, bool) or not isinstance(take, int) or take < 1):
        raise ValueError(f"take={take!r}{where} must be a whole number of at least 1, or None for all.")


def _weights(source: Any) -> dict[str, float | None]:
    """Sources -> weight, None where it is no mixture."""
    if isinstance(source, Mapping):
        for name, weight in source.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f"source: the weight of {name!r} is {weight!r}; it must be a number above 0.")
        found: dict[str, float | None] = {str(name): float(weight) for name, weight in source.items()}
    else:
        names = [source] if isinstance(source, (str, os.PathLike)) or not isinstance(source, Sequence) else source
        for name in names:
            if not isinstance(name, (str, os.PathLike)):
                raise TypeError(
                    f"source has {name!r:.80}: give a name, an id on the Hub or a file, a list of these, or a mixture "
                    "as a mapping {source: weight}."
                )
        found = {os.fspath(name): None for name in names}
        if len(found) < len(names):
            raise ValueError(f"source={names} names one twice: give a mixture's weights as {{source: weight}}.")
    if not found:
        raise ValueError("source is empty: say where the prompts come from.")
    return found


def _overrides(overrides: Any, weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is said of one source: of those that are read any argument, of those that only `decontaminate` names where
    their problems are."""
    if not isinstance(overrides or {}, Mapping):
        raise TypeError(f"overrides={overrides!r:.80} must be a mapping: {{source: {{argument: value}}}}.")
    given = {os.fspath(name): values for name, values in (overrides or {}).items()}
    named = [own["decontaminate"], *(v.get("decontaminate", ()) for v in given.values() if isinstance(v, Mapping))]
    named = [names for names in named if isinstance(names, Sequence)]  # what is none is refused with its source
    against = {name for names in named if not isinstance(names, str) for name in names or ()}
    for name, values in given.items():
        if name not in weights and name not in against:
            sources = [*weights, *(name for name in against if isinstance(name, str))]
            raise ValueError(
                f"overrides has {name!r}, which is no source{_near(name, sources)}; they are {_all(sources)}."
            )
        if not isinstance(values, Mapping):
            raise TypeError(f"overrides[{name!r}]={values!r:.80} must be a mapping of arguments to values.")
        known = (*own, *_CHOICE) if name in weights else _OF_EVALUATION
        for key in values:
            if key not in known:
                raise ValueError(f"overrides[{name!r}] has {key!r}{_near(key, known)}; it may have {_all(known)}.")
    return given


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [str(entry) for entry in known], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _all(names: Any) -> str:
    return ", ".join(map(str, names))
