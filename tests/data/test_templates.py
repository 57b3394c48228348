r"""Each template, as the rows of `load_prompts` and as two families of chat templates write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trl_grpo_ext import load_prompts
from trl_grpo_ext.data.prompts import PromptEncoder
from trl_grpo_ext.data.templates import QWEN_SYSTEM_PROMPT, R1_SYSTEM_PROMPT, make_prompter

R1 = R1_SYSTEM_PROMPT
SHOT = {"problem": "1 + 1?", "answer": "2", "solution": "One more than one."}


def wrapped(tokenizer: PreTrainedTokenizerFast, *messages: tuple[str, str]) -> str:
    """What the two families write, by hand."""
    if "im_start" in tokenizer.chat_template:
        turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
        return f"{turns}<|im_start|>assistant\n"
    turns = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in messages)
    return f"<|begin_of_text|>{turns}<|start_header_id|>assistant<|end_header_id|>\n\n"


CONVERSATIONS = {
    "r1": [("system", R1), ("user", "2 + 3?")],
    "qwen-boxed": [("system", QWEN_SYSTEM_PROMPT), ("user", "2 + 3?")],
    "plain": [("user", "2 + 3?")],
}


@pytest.mark.parametrize("template", CONVERSATIONS)
def test_conversations(template: str, chat_tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    file = write("a.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    prompt = load_prompts(file, template=template)[0]["prompt"]
    assert prompt == [{"role": role, "content": content} for role, content in CONVERSATIONS[template]]
    assert PromptEncoder(chat_tokenizer).text(prompt) == wrapped(chat_tokenizer, *CONVERSATIONS[template])


def test_r1_zero_is_text_that_no_chat_template_touches(
    chat_tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    file = write("a.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    prompt = load_prompts(file, template="r1-zero")[0]["prompt"]
    assert prompt == f"{R1} User: 2 + 3?. Assistant:"
    assert PromptEncoder(chat_tokenizer).text(prompt) == prompt


EXAMPLES = {
    "r1": "<think> One more than one. </think><answer> 2 </answer>",
    "qwen-boxed": "One more than one.\nThe answer is $\\boxed{2}$.",
    "plain": "One more than one.",
}


@pytest.mark.parametrize("template", EXAMPLES)
def test_examples_are_turns_of_the_conversation(template: str, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    prompter = make_prompter(template, system_prompt="Be brief.", few_shot=[SHOT])
    turns = [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", EXAMPLES[template]), ("user", "2 + 3?")]
    prompt = prompter("2 + 3?", {})
    assert prompt == [{"role": role, "content": content} for role, content in turns]
    assert PromptEncoder(chat_tokenizer).text(prompt) == wrapped(chat_tokenizer, *turns)


def test_examples_in_text_and_without_a_solution(tmp_path: Path) -> None:
    file = tmp_path / "shots.jsonl"
    file.write_text('{"problem": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    prompt = make_prompter("r1-zero", system_prompt="Think.", few_shot=str(file))("2 + 3?", {})
    assert prompt == "Think. User: 1 + 1?. Assistant: <answer> 2 </answer> User: 2 + 3?. Assistant:"


def test_box_of_a_worked_solution_is_not_written_twice() -> None:
    shot = {"problem": "1 + 1?", "answer": "2", "solution": r"It is \boxed{2}."}
    assert make_prompter("qwen-boxed", few_shot=[shot])("x", {})[2]["content"] == r"It is \boxed{2}."


def test_empty_system_prompt_is_none() -> None:
    assert make_prompter("r1", system_prompt="")("x", {}) == [{"role": "user", "content": "x"}]


def test_own_templates(write: Callable[..., str], tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    file = write("a.jsonl", [{"problem": "2 + 3? {{ 7 * 6 }}", "answer": "5", "hint": "count"}])
    text = "{{ system_prompt }}Q: {{ problem }} ({{ hint }})\nA:"
    (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    for template in (text, str(tmp_path / "own.jinja")):
        prompt = load_prompts(file, template=template, system_prompt="Go. ")[0]["prompt"]
        assert prompt == "Go. Q: 2 + 3? {{ 7 * 6 }} (count)\nA:"  # what a problem holds is never run
    parts = {"system": "S", "user": "Q: {{ problem }}", "assistant": "A: {{ answer }}"}
    turns = [("system", "S"), ("user", "Q: 1 + 1?"), ("assistant", "A: 2"), ("user", "Q: 2 + 3? {{ 7 * 6 }}")]
    prompt = load_prompts(file, template=parts, few_shot=[SHOT])[0]["prompt"]
    assert PromptEncoder(chat_tokenizer).text(prompt) == wrapped(chat_tokenizer, *turns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "r2"}, r"template='r2' is not known \(did you mean 'r1'\?\)"),
        ({"template": "none.jinja"}, "template='none.jinja' cannot be read"),
        ({"template": "Q: {{ problem"}, "line 1, is no Jinja"),
        ({"template": "{% if true %}x{% endif %}"}, "does not show the problem"),
        ({"template": {"user": "{{ problem }}", "assistent": ""}}, r"template has the keys \['user', 'assistent'\]"),
        ({"template": "{{ problem }}", "system_prompt": "S"}, "system_prompt is given, but .* has no place for it"),
        ({"template": "{{ problem }}", "few_shot": [SHOT]}, "few_shot is given, but .* has no place for it"),
        ({"few_shot": [{"question": "1 + 1?"}]}, "few_shot, row 0 is .* an example has problem and answer"),
        ({"few_shot": "none.jsonl"}, "few_shot='none.jsonl' cannot be read"),
        ({"few_shot": [{"problem": "1 + 1?", "answer": None}]}, "few_shot, row 0 is .* has problem and answer"),
        ({"few_shot": "{empty}"}, "few_shot='.*empty.jsonl' has no examples: it is empty"),
        ({"few_shot": "{torn}"}, "few_shot='.*torn.jsonl' cannot be read: line 3 is not JSON"),
        ({"template": "{{ problem | nosuch }}"}, "line 1, is no Jinja: No filter named 'nosuch'"),
        ({"template": {"user": "Solve it."}}, r"template\['user'\]='Solve it.' does not show the problem"),
        ({"template": {"user": 5}}, r"template\['user'\] must be text, it is 5"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n\n{"problem": ')
    for name in ("empty", "torn"):
        if arguments.get("few_shot") == f"{{{name}}}":
            arguments = {"few_shot": str(tmp_path / f"{name}.jsonl")}
    with pytest.raises(ValueError, match=message):
        make_prompter(**{"template": "r1", **arguments})  # type: ignore[arg-type]


def test_template_that_fails_on_a_row_says_which(write: Callable[..., str]) -> None:
    file = write("a.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    with pytest.raises(ValueError, match=r"a\.jsonl', row 0: template=.* cannot be rendered: 'hint' is undefined"):
        load_prompts(file, template="{{ problem }} {{ hint }}")


def test_sandbox() -> None:
    with pytest.raises(ValueError, match="cannot be rendered: access to attribute '__class__'"):
        make_prompter("{{ problem.__class__.__mro__ }}")("x", {})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ problem / 2 }}", "cannot be rendered: unsupported operand"),
        ("{{ problem }}{{ 1 // 0 }}", "cannot be rendered: integer division or modulo by zero"),
        ("{% for n in range(10 ** 9) %}{% endfor %}{{ problem }}", "cannot be rendered: Range too big"),
        ("{% if answer == '6' %}{{ problem }}{% endif %}", "makes an empty prompt of it"),
    ],
)
def test_whatever_a_template_raises_names_source_and_row(
    template: str, message: str, write: Callable[..., str]
) -> None:
    file = write("a.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    with pytest.raises(ValueError, match=rf"a\.jsonl', row 0: template=.* {message}"):
        load_prompts(file, template=template)


def test_examples_never_show_what_the_row_holds(write: Callable[..., str]) -> None:
    file = write("a.jsonl", [{"problem": "2 + 3?", "answer": "5", "rationale": "it is 5"}])
    template = {"user": "{{ problem }}", "assistant": "{{ rationale }}"}
    with pytest.raises(ValueError, match=r"row 0: .*'rationale' is undefined.*may use answer, problem, solution"):
        load_prompts(file, template=template, few_shot=[SHOT])
    shots = [{**SHOT, "rationale": "one and one"}]
    assert load_prompts(file, template=template, few_shot=shots)[0]["prompt"][1]["content"] == "one and one"


def test_tokenizer_without_a_system_role_is_named_with_row_and_remedy(
    write: Callable[..., str], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gemma's chat template refuses a system message."""
    chat_tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + chat_tokenizer.chat_template
    )
    file = write("a.jsonl", [{"problem": "2 + 3?", "answer": "5"}])
    limit: dict[str, object] = {"tokenizer": chat_tokenizer, "max_prompt_tokens": 2000, "few_shot": [SHOT]}
    with pytest.raises(
        ValueError,
        match=r"a\.jsonl', row 0: .* roles system, user, assistant, user: System role not supported.*system_prompt=''",
    ):
        load_prompts(file, **limit)  # type: ignore[arg-type]
    prompts = load_prompts(file, system_prompt="", template={"user": "Think. {{ problem }}"}, **limit)  # type: ignore[arg-type]
    assert [message["role"] for message in prompts[0]["prompt"]] == ["user", "assistant", "user"]


def test_example_whose_solution_is_null_has_none() -> None:
    shots: list[dict[str, Any]] = [{"problem": "1 + 1?", "answer": 2, "solution": None}]
    assert make_prompter("r1", few_shot=shots)("x", {})[2]["content"] == "<answer> 2 </answer>"


def test_mark_that_windows_puts_in_front_is_no_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("Q: {{ problem }}", encoding="utf-8-sig")
    (tmp_path / "shots.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n', encoding="utf-8-sig")
    assert make_prompter(str(tmp_path / "own.jinja"))("x", {}) == "Q: x"
    assert len(make_prompter("r1", few_shot=str(tmp_path / "shots.jsonl"))("x", {})) == 4
