r"""`load_prompts`: sources, filters, mixtures, the cache, streams, and what it refuses."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from trl_grpo_ext import PromptReport, load_prompts
from trl_grpo_ext.data.rows import Preparation

ROWS = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n), "level": f"Level {n % 3}"} for n in range(7)]
Write = Callable[..., str]


def numbers(prompts: Any) -> list[str]:
    return [row["solution"] for row in prompts]


# Sources


def test_every_kind_of_file(tmp_path: Path, write: Write) -> None:
    jsonl = write("a.jsonl", ROWS)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(Path(jsonl).read_text())
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name, sep in (("a.csv", ","), ("a.tsv", "\t")):
        lines = [sep.join(ROWS[0]), *(sep.join(row.values()) for row in ROWS)]
        (tmp_path / name).write_text("\n".join(lines))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert numbers(load_prompts(str(tmp_path / name))) == ["0", "2", "4", "6", "8", "10", "12"], name
    for name in ("a.csv", "a.tsv"):  # a number there is a number
        assert numbers(load_prompts(tmp_path / name)) == ["0", "2", "4", "6", "8", "10", "12"], name


def test_columns_of_a_set_that_is_not_known(write: Write) -> None:
    file = write("own.jsonl", [{"q": "What is 6 * 7?", "a": "So\n#### 42", "grade": 3, "pass_rate": 0.5}])
    columns = {"problem": "q", "answer": "a", "level": "grade"}
    assert load_prompts(file, columns=columns, answer="gsm8k", template="plain")[0] == {
        "problem": "What is 6 * 7?",
        "prompt": [{"role": "user", "content": "What is 6 * 7?"}],
        "solution": "42",
        "source": file,
        "level": 3,
        "pass_rate": 0.5,
    }


def test_forms_of_the_known_sets(write: Write) -> None:
    hub = write("hub.jsonl", [{"Body": "Ann has 3.", "Question": "How many?", "Answer": "3.0", "Type": "Sum"}])
    row = load_prompts(f"svamp:{hub}", template="plain")[0]
    assert (row["problem"], row["solution"], row["subject"]) == ("Ann has 3. How many?", "3", "Sum")
    hub = write("math.jsonl", [{"problem": "x?", "solution": r"\boxed{4}", "level": "Level ?", "type": "Algebra"}])
    row = load_prompts(f"math:{hub}")[0]
    assert (row["solution"], row["level"], row["subject"]) == ("4", None, "Algebra")
    hub = write("countdown.jsonl", [{"nums": [1, 2, 3], "target": 6}])
    row = load_prompts(f"countdown:{hub}")[0]
    assert (row["nums"], row["target"], row["solution"]) == ([1, 2, 3], 6, "6")
    assert row["problem"].startswith("Using the numbers [1, 2, 3], create an equation that equals 6.")


# Filters


def test_token_limit_counts_what_the_model_reads(write: Write, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    file = write("a.jsonl", [{"problem": "x" * n, "answer": "1"} for n in (3, 10, 11)])
    rendered = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": "x" * 10}], tokenize=False, add_generation_prompt=True
    )
    limit = len(rendered)  # a token is a byte
    report = PromptReport()
    kept = load_prompts(file, template="plain", tokenizer=chat_tokenizer, max_prompt_tokens=limit, report=report)
    assert [len(row["problem"]) for row in kept] == [3, 10]
    assert report.of(file).dropped == {"too long": 1}
    (example,) = report.of(file).examples["too long"]
    assert (example.row, example.problem, example.why) == (2, "x" * 11, f"{limit + 1} tokens, more than {limit}")


@pytest.mark.parametrize("streaming", [False, True])
def test_duplicates(streaming: bool, write: Write) -> None:
    problems = ["What is $x +1$?", "what is x+ 1", "What is $x - 1$?", "What is $x +1$?", "12 3", "1 23"]
    file = write("a.jsonl", [{"problem": problem, "answer": str(n)} for n, problem in enumerate(problems)])
    for deduplicate, kept in (("normalized", "0 2 4 5"), ("exact", "0 1 2 4 5"), ("off", "0 1 2 3 4 5")):
        report = PromptReport()
        prompts = load_prompts(file, deduplicate=deduplicate, streaming=streaming, report=report)
        assert " ".join(numbers(prompts)) == kept
        assert report.dropped["duplicates"] == 6 - len(kept.split()) and report.kept == len(kept.split())


def test_duplicates_across_sources_are_the_later_ones(write: Write) -> None:
    first, second = write("a.jsonl", ROWS[:3]), write("b.jsonl", ROWS[1:5])
    report = PromptReport()
    prompts = load_prompts([first, second], report=report)
    assert list(zip(prompts["source"], prompts["solution"], strict=True)) == [
        (first, "0"),
        (first, "2"),
        (first, "4"),
        (second, "6"),
        (second, "8"),
    ]
    assert report.of(second).dropped == {"duplicates": 2}
    assert report.of(second).examples["duplicates"][0].why == f"the same as row 1 of {first}"


def test_duplicate_with_another_answer_is_shown_as_such(write: Write) -> None:
    file, report = write("a.jsonl", [{"problem": "p", "answer": "1"}, {"problem": "P.", "answer": "2"}]), PromptReport()
    load_prompts(file, report=report)
    (example,) = report.of(file).examples["duplicates"]
    assert example.why == f"the same as row 0 of {file}, where the answer is '1' and not '2'"


def test_number_that_no_float_holds_is_refused(write: Write) -> None:
    file = write("a.jsonl", [{"problem": "p", "answer": 123456789012345678901234567890}])
    with pytest.raises(ValueError, match=r"row 0: 'answer' .*may have lost digits: it must be written as text"):
        load_prompts(file)


@pytest.mark.parametrize("streaming", [False, True])
def test_pass_rate_band(streaming: bool, write: Write) -> None:
    rates = [0.0, 0.125, 0.5, 0.875, 1.0, None]
    rows = [{"problem": f"p{n}", "answer": str(n), "pass_rate": rate} for n, rate in enumerate(rates)]
    file, report = write("a.jsonl", rows), PromptReport()
    assert numbers(load_prompts(file, pass_rate=(0.125, 0.875), streaming=streaming, report=report)) == ["1", "2", "3"]
    assert report.dropped == {"outside of the pass-rate band": 3}
    assert report.of(file).examples["outside of the pass-rate band"][2].why == "it has no pass rate"


def test_unreadable_rows_are_counted_where_they_are_dropped(write: Write) -> None:
    file = write("a.jsonl", [*ROWS[:2], {"problem": "p", "answer": None}, {"problem": None, "answer": "3"}])
    for streaming in (False, True):
        report = PromptReport()
        assert numbers(load_prompts(file, unreadable="drop", streaming=streaming, report=report)) == ["0", "2"]
        assert report.dropped == {"unreadable": 2} and [e.row for e in report.of(file).examples["unreadable"]] == [2, 3]
        for example, why in zip(report.of(file).examples["unreadable"], ("is 'None'", "must be text"), strict=True):
            assert example.why.endswith(why)  # and no remedy, which is taken already
    with pytest.raises(ValueError, match=r"a\.jsonl', row 2: 'answer' must be text or a number, it is 'None'"):
        load_prompts(file)


# Mixtures and choices


def test_mixture_has_the_weights(write: Write) -> None:
    files = [
        write(f"{name}.jsonl", [{"problem": f"{name}{n}", "answer": "1"} for n in range(400)]) for name in ("a", "b")
    ]
    report = PromptReport()
    mixed = load_prompts({files[0]: 3, files[1]: 1}, seed=1, report=report)
    counts = Counter(mixed["source"])
    # 3 : 1 until `a`'s 400 are used up: of about 533 rows 133 are of `b`, with a standard deviation of 11 or so
    assert counts[files[0]] == 400 and 100 < counts[files[1]] < 170
    assert report.of(files[1]).unused == 400 - counts[files[1]] and "not used" in str(report)
    again, other = (load_prompts({files[0]: 3, files[1]: 1}, seed=seed) for seed in (1, 2))
    assert mixed["problem"][:] == again["problem"][:] != other["problem"][:]
    stream = load_prompts({files[0]: 3, files[1]: 1}, seed=1, streaming=True)
    assert 0.65 < Counter(row["source"] for row in stream.take(200))[files[0]] / 200 < 0.85


def test_sources_of_different_columns_and_overrides(write: Write) -> None:
    plain = write("a.jsonl", [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}])
    own = write("b.jsonl", [{"task": "r", "final": r"\boxed{3}", "subject": "Algebra"}])
    overrides = {
        own: {"columns": {"problem": "task", "answer": "final", "subject": "subject"}, "answer": "boxed"},
        plain: {"skip": 1, "template": "qwen-boxed"},
    }
    rows = load_prompts([plain, own], overrides=overrides, template="plain")[:]
    assert (rows["solution"], rows["subject"]) == (["2", "3"], [None, "Algebra"])
    assert [len(prompt) for prompt in rows["prompt"]] == [2, 1]  # with a system message, and without


def test_shuffle_skip_take(write: Write) -> None:
    file, report = write("a.jsonl", ROWS), PromptReport()
    assert numbers(load_prompts(file, skip=2, take=3, report=report)) == ["4", "6", "8"]
    assert (report.read, report.kept, report.of(file).unused) == (7, 3, 4)
    shuffled = numbers(load_prompts(file, shuffle=True, seed=3))
    assert sorted(shuffled) == sorted(row["answer"] for row in ROWS) and shuffled != [row["answer"] for row in ROWS]
    assert numbers(load_prompts(file, shuffle=True, seed=3, skip=2, take=3)) == shuffled[2:5]
    assert numbers(load_prompts(file, skip=2, take=3, streaming=True)) == ["4", "6", "8"]


# datasets: cache and streams


def test_second_call_is_served_from_the_cache(
    write: Write, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = write("a.jsonl", ROWS), write("b.jsonl", [{"problem": "What is 2 + 2?", "answer": "4"}])

    def load(**changed: Any) -> Dataset:
        settings = {"max_prompt_tokens": 700, "tokenizer": chat_tokenizer, "decontaminate": [other], **changed}
        return load_prompts(file, **settings)

    first = load()
    chat_tokenizer("a tokenizer that was used pickles to other bytes", truncation=True, max_length=4)
    calls = []
    prepare = Preparation.__call__
    monkeypatch.setattr(Preparation, "__call__", lambda self, *args: calls.append(self.name) or prepare(self, *args))
    second = load()
    assert calls == [] and second[:] == first[:] and second._fingerprint == first._fingerprint
    assert len(second) == 6 and second.cache_files == first.cache_files
    load(template="qwen-boxed")
    assert calls == [file]  # the problems of the other file, which are not changed, are cached still


def test_report_of_a_cached_call_is_whole(write: Write) -> None:
    file = write("a.jsonl", [*ROWS, ROWS[0]])
    reports = [PromptReport(), PromptReport()]
    for report in reports:
        load_prompts(file, report=report, decontaminate=[write("b.jsonl", ROWS[3:4])])
    assert reports[0].as_dict() == reports[1].as_dict()
    assert reports[1].dropped == {"contaminated": 1, "duplicates": 1}
    assert str(reports[1]).startswith(
        f"{file}: 8 read, 6 kept, 1 contaminated, 1 duplicates\n  such as row 3 (contaminated): "
    )


def test_stream_gives_the_same_rows_in_every_pass(write: Write) -> None:
    file = write("a.jsonl", [*ROWS, *ROWS[:2]])
    report = PromptReport()
    stream = load_prompts(file, streaming=True, report=report)
    assert isinstance(stream, IterableDataset)
    passes = [list(stream) for _ in range(2)]
    assert passes[0] == passes[1] == list(load_prompts(file))
    assert (report.read, report.kept, report.dropped) == (9, 7, {"duplicates": 2})  # of one pass, not of both


def test_stream_reads_no_further_than_it_must(write: Write) -> None:
    file = write("a.jsonl", [{"problem": f"p{n}", "answer": "1"} for n in range(3000)])
    report = PromptReport()
    stream = load_prompts(file, streaming=True, report=report)
    assert next(iter(stream))["problem"] == "p0" and report.read < 1000
    assert str(report).endswith("kept (so far, of a stream)")


# Refusals


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("gsm9k", {}, r"source='gsm9k' is not known \(did you mean 'gsm8k'\?\); known are gsm8k, math"),
        ("none.jsonl", {}, "source='none.jsonl': there is no file 'none.jsonl'"),
        ("gsm8k:none.jsonl", {}, "source='gsm8k:none.jsonl': there is no file"),
        ("{pdf}", {}, "a file must end in one of .jsonl"),
        ("{torn}", {}, r"torn\.jsonl cannot be read: line 2 is not JSON \(Expecting value, character 13\): "),
        ("{torn}", {"streaming": True}, r"torn\.jsonl cannot be read: line 2 is not JSON"),
        ("{ragged}", {}, r"ragged\.csv cannot be read: .*Expected 2 fields in line 3, saw 4"),
        ("{ragged}", {"streaming": True}, r"ragged\.csv cannot be read: .*Expected 2 fields in line 3, saw 4"),
        ("{head}", {}, r"head\.csv cannot be read: it holds no rows"),
        ("{head}", {"streaming": True}, r"head\.csv cannot be read: it holds no rows"),
        ("{unzipped}", {}, r"unzipped\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("{empty}", {}, r"empty\.jsonl'.*(has no rows|cannot be read)"),
        ("{rows}", {"columns": {"problem": "problm"}}, r"columns\['problem'\]='problm'.*did you mean 'problem'"),
        (
            "{rows}",
            {"columns": {"answer": "gold"}},
            r"columns\['answer'\]='gold': .* has no such column; it has problem",
        ),
        ("{rows}", {"columns": {"prompt": "problem"}}, r"columns has \['prompt'\]"),
        ("gsm8k:{rows}", {}, r"no column for the problem: expected 'question', it has .* columns=\{'problem'"),
        ("{torn_answer}", {}, r"row 1: 'answer' must not be blank, it is ''. Correct the row, or say"),
        ("{rows}", {"answer": "boxed"}, r"row 0: 'answer' must hold its answer in \\boxed.*it is '0'.*now 'boxed'"),
        ("{rows}", {"answer": "latex"}, "answer='latex' is no parser of gold answers: give one of gsm8k, boxed"),
        ("{rows}", {"config": "de"}, "config='de': .* is a local file without configurations"),
        ("math-500", {}, "source='math-500' has no split 'train'; it has test: split='test'"),
        ("{rows}", {"max_prompt_tokens": 5}, "max_prompt_tokens=5 needs a tokenizer"),
        ("{rows}", {"max_prompt_tokens": 0}, "max_prompt_tokens=0 must be a whole number of at least 1"),
        ("{rows}", {"deduplicate": "fuzzy"}, "deduplicate='fuzzy' must be one of normalized, exact, off"),
        ("{rows}", {"stopping_strategy": "last"}, "stopping_strategy='last' must be one of first_exhausted"),
        ("{rows}", {"unreadable": "skip"}, "unreadable='skip' must be one of error, drop"),
        ("{rows}", {"decontaminate": "gsm8k"}, "decontaminate='gsm8k' must be a list"),
        ("{rows}", {"decontaminate": ["gsm9k"]}, "source='gsm9k' is not known"),
        ("{rows}", {"decontaminate_ngram": 0}, "decontaminate_ngram=0 must be a whole number"),
        ("{rows}", {"decontaminate_share": 2}, "decontaminate_share=2 must be within 0..1"),
        ("{rows}", {"pass_rate": (0.9, 0.1)}, r"pass_rate=\(0.9, 0.1\) must be two numbers"),
        ("{rows}", {"pass_rate": (0.1, 0.9)}, "has no column 'pass_rate'. Measure it with `trl-grpo difficulty`"),
        ("{rows}", {"pass_rate": 0.5}, "pass_rate=0.5 must be two numbers"),
        ("{rows}", {"pass_rate": ("low", "high")}, r"pass_rate=.* must be two numbers"),
        ("{rows}", {"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ("{rows}", {"split": None}, "split=None of source=.* must be text"),
        ("{rows}", {"skip": -1}, "skip=-1 must be"),
        ("{rows}", {"take": 0}, "take=0 must be"),
        ("{rows}", {"skip": 7}, "no prompt is left. Loosen the filters.*\n.*7 read, 0 kept, 7 not used"),
        ("{rows}", {"skip": 7, "streaming": True}, "no prompt is left"),
        ("{rows}", {"decontaminate": ["{rows}"]}, "no prompt is left.*\n.*7 read, 0 kept, 7 contaminated"),
        ("{rows}", {"overrides": {"gsm8k": {}}}, "overrides has 'gsm8k', which is no source"),
        ("{rows}", {"overrides": {"{rows}": {"templat": ""}}}, "has 'templat' .did you mean 'template'"),
        ([], {}, "source is empty"),
        ({}, {}, "source is empty"),
        (["{rows}", "{rows}"], {}, "names one twice"),
        ({"{rows}": 0}, {}, "the weight of .* is 0; it must be a number above 0"),
        ({"{rows}": 1, "gsm9k": 1}, {}, "source='gsm9k' is not known"),
    ],
)
def test_refusals(source: Any, arguments: dict[str, Any], message: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "torn.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem": ')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "ragged.csv").write_text("problem,answer\na,5\nb,6,7,8\n")
    (tmp_path / "head.csv").write_text("problem,answer\n")
    (tmp_path / "unzipped.jsonl.gz").write_text("{}")
    places = {
        "rows": write("rows.jsonl", ROWS),
        "torn_answer": write("answer.jsonl", [ROWS[0], {**ROWS[1], "answer": ""}]),
        "pdf": str(tmp_path / "a.pdf"),
        **{name: str(tmp_path / f"{name}.jsonl") for name in ("torn", "empty")},
        **{name: str(tmp_path / f"{name}.csv") for name in ("ragged", "head")},
        "unzipped": str(tmp_path / "unzipped.jsonl.gz"),
    }

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            for name, path in places.items():
                value = value.replace("{" + name + "}", path)
            return value
        if isinstance(value, dict):
            return {filled(key): filled(entry) for key, entry in value.items()}
        return [filled(entry) for entry in value] if isinstance(value, list) else value

    with pytest.raises(ValueError, match=message):
        load_prompts(filled(source), **filled(arguments))


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ([("gsm8k", 0.5)], {}, r"source has \('gsm8k', 0.5\): give a name.* or a mixture as a mapping"),
        (None, {}, "source has None"),
        ("a.jsonl", {"columns": "problem"}, "columns='problem' must be a mapping"),
        ("a.jsonl", {"columns": {"problem": ["a", "b"]}}, r"columns\['problem'\]=.* must be the name of one column"),
        ("a.jsonl", {"overrides": ["a.jsonl"]}, "overrides=.* must be a mapping"),
        ("a.jsonl", {"overrides": {"a.jsonl": None}}, r"overrides\['.*a\.jsonl'\]=None must be a mapping"),
        ("a.jsonl", {"decontaminate": [5]}, "decontaminate has 5"),
        ("a.jsonl", {"decontaminate": 5}, "decontaminate=5 must be a list of sources"),
        ("a.jsonl", {"few_shot": 3}, "few_shot=3 must be a list of examples"),
        ("a.jsonl", {"report": []}, r"report=\[\] must be a PromptReport"),
        ("a.jsonl", {"tokenizer": "gpt2", "max_prompt_tokens": 4}, "tokenizer='gpt2' must be a tokenizer"),
        ("a.jsonl", {"template": None}, "template=None must be text or a mapping"),
    ],
)
def test_arguments_of_another_type(
    source: Any, arguments: dict[str, Any], message: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(write("a.jsonl", ROWS)).parent)
    with pytest.raises(TypeError, match=message):
        load_prompts(source, **arguments)


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, copy in (("gsm8k", "as 'gsm8k:FILE'"), ("nobody/nothing", "by its path")):
        with pytest.raises(ValueError, match=f"source='{source}': .* cannot be had from the Hub: .*{copy}"):
            load_prompts(source)


def test_mixed_forms_and_kinds_are_refused(write: Write) -> None:
    first = write("a.jsonl", [{"problem": "p", "answer": "1", "level": 3}])
    second = write("b.jsonl", [{"problem": "q", "answer": "1", "level": "hard"}])
    with pytest.raises(ValueError, match="make messages of some prompts and plain text of others"):
        load_prompts([first, second], overrides={second: {"template": "r1-zero"}})
    with pytest.raises(
        ValueError, match=r"the column 'level' is .*int64.* in .*a\.jsonl' and .*string.* in .*b\.jsonl'"
    ):
        load_prompts([first, second], columns={"level": "level"})


def test_chat_template_is_needed_to_count_the_tokens_of_a_conversation(
    write: Write, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write("a.jsonl", ROWS)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_prompts(file, tokenizer=tiny_tokenizer, max_prompt_tokens=900)
    assert len(load_prompts(file, template="r1-zero", tokenizer=tiny_tokenizer, max_prompt_tokens=900)) == 7


def test_file_of_rows_can_be_trained_on_again(write: Write, tmp_path: Path) -> None:
    """What `load_prompts` made, written to a file, is a source again: `problem` and `solution` are its columns."""
    prompts = load_prompts(write("a.jsonl", ROWS))
    prompts.to_json(str(tmp_path / "saved.jsonl"))
    again = load_prompts(str(tmp_path / "saved.jsonl"), columns={"answer": "solution"})
    assert again["prompt"][:] == prompts["prompt"][:]
    assert json.loads((tmp_path / "saved.jsonl").read_text().splitlines()[0])["solution"] == "0"
    assert Path.home() != datasets.config.HF_DATASETS_CACHE
