"""What `decontaminate` names: evaluation sources with columns, splits and files of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trl_grpo_ext import PromptReport, load_prompts

Write = Callable[..., str]
ROWS = [{"problem": f"Add {n} to itself.", "answer": str(2 * n)} for n in range(6)]


def test_golds_are_not_needed(write: Write) -> None:
    file = write("a.jsonl", ROWS)
    for number, row in enumerate(({"problem": ROWS[2]["problem"], "answer": None}, {"problem": ROWS[2]["problem"]})):
        report = PromptReport()
        load_prompts(file, decontaminate=[write(f"held_out_{number}.jsonl", [row])], report=report)
        assert report.dropped == {"contaminated": 1}, row


@pytest.mark.parametrize("streaming", [False, True])
def test_overrides_say_where_the_problems_are(streaming: bool, write: Write) -> None:
    file = write("a.jsonl", ROWS)
    held_out = write("held_out.jsonl", [{"question": ROWS[4]["problem"], "lang": "de"}])
    with pytest.raises(ValueError, match=r"decontaminate: .*no column for the problem: .*overrides=\{'.*held_out"):
        load_prompts(file, decontaminate=[held_out])
    report = PromptReport(examples=None)
    overrides = {held_out: {"columns": {"problem": "question"}}}
    prompts = load_prompts(file, decontaminate=[held_out], overrides=overrides, streaming=streaming, report=report)
    assert len(list(prompts)) == 5
    assert [example.row for example in report.of(file).examples["contaminated"]] == [4]


def test_configuration_of_an_evaluation_source(write: Write) -> None:
    """One language of MGSM."""
    file = write("a.jsonl", ROWS)
    rows = [{"question": ROWS[n]["problem"], "answer": "1", "lang": lang} for n, lang in enumerate(("de", "en", "de"))]
    source = f"mgsm:{write('mgsm.jsonl', rows)}"
    kept = load_prompts(file, decontaminate=[source], overrides={source: {"config": "de"}})
    assert kept["problem"][:] == [ROWS[n]["problem"] for n in (1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"held_out": {"template": "r1"}},
            r"overrides\['.*held_out.*'\] has 'template'; it may have split, config, col",
        ),
        ({"held_out": {"column": {}}}, r"has 'column' \(did you mean 'columns'\?\)"),
        ({"other": {"columns": {}}}, "overrides has 'other', which is no source"),
        ({"held_out": {"columns": {"problem": "q"}}}, r"columns\['problem'\]='q': source=.* has no such column"),
    ],
)
def test_refusals(overrides: dict[str, Any], message: str, write: Write) -> None:
    held_out = write("held_out.jsonl", ROWS[:1])
    overrides = {held_out if name == "held_out" else name: values for name, values in overrides.items()}
    with pytest.raises(ValueError, match=message):
        load_prompts(write("a.jsonl", ROWS), decontaminate=[held_out], overrides=overrides)
