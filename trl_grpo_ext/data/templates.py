r"""Problems as prompts: the templates of the papers, and the user's own.

Templates are Jinja, rendered in the sandbox that `transformers` renders chat templates in. They see `problem`,
`system_prompt`, `few_shot` (a list of {problem, answer, solution}) and the row's other columns by name.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .prompts import Prompt

# DeepSeek-R1, arXiv:2501.12948, Table 1
R1_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>."
)
# Qwen2.5-Math, arXiv:2409.12122, Appendix: its evaluations' system prompt
QWEN_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class PromptTemplate:
    """How a problem is put to the model.

    Attributes:
        text: Jinja of a plain-text prompt; "" for a conversation.
        system: the system message of a conversation, as it is; `system_prompt` takes its place. None for no message.
        user: Jinja of its user messages: the examples' and the problem's.
        assistant: Jinja of an example's answer, which sees `problem`, `answer` and `solution`.
    """

    text: str = ""
    system: str | None = None
    user: str = "{{ problem }}"
    assistant: str = "{{ solution or answer }}"


# What an expression of a template raises: adding text to a number, dividing by 0, a range that the sandbox refuses, ...
_OF_EXPRESSIONS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_THINK_ANSWER = "{% if solution %}<think> {{ solution }} </think>{% endif %}<answer> {{ answer }} </answer>"
TEMPLATES: dict[str, PromptTemplate] = {
    "r1": PromptTemplate(system=R1_SYSTEM_PROMPT, assistant=_THINK_ANSWER),
    # Table 1 as text, for base models, which have no chat template
    "r1-zero": PromptTemplate(
        text="{{ system_prompt }}{% for shot in few_shot %} User: {{ shot.problem }}. Assistant: "
        "{% if shot.solution %}<think> {{ shot.solution }} </think>{% endif %}<answer> {{ shot.answer }} </answer>"
        "{% endfor %} User: {{ problem }}. Assistant:",
        system=R1_SYSTEM_PROMPT,
    ),
    "qwen-boxed": PromptTemplate(
        system=QWEN_SYSTEM_PROMPT,
        assistant="{% if solution and '\\\\boxed' in solution %}{{ solution }}"
        "{% else %}{% if solution %}{{ solution }}\n{% endif %}The answer is $\\boxed{{ '{' }}{{ answer }}{{ '}' }}$."
        "{% endif %}",
    ),
    # The chat template alone: nothing is said about how to answer
    "plain": PromptTemplate(),
}


@dataclass(frozen=True)
class Prompter:
    """A template with its system prompt and examples: row -> prompt."""

    template: PromptTemplate
    system_prompt: str | None = None
    few_shot: tuple[Mapping[str, str], ...] = ()
    name: str = ""
    _row_columns: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def conversational(self) -> bool:
        return not self.template.text

    def __call__(self, problem: str, columns: Mapping[str, Any]) -> Prompt:
        """The prompt of a problem: text, or messages.

        Raises:
            ValueError: the template asks for a column that the row does not have, or cannot be rendered.
        """
        seen = {**columns, "problem": problem, "few_shot": list(self.few_shot), "system_prompt": self.system or ""}
        if not self.conversational:
            return self._shown(self._render(self.template.text, seen))
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for shot in self.few_shot:
            messages.append({"role": "user", "content": self._render(self.template.user, {**seen, **shot})})
            # Of the example alone: what the row at hand holds (its solution) has no place in another problem's answer
            messages.append({"role": "assistant", "content": self._render(self.template.assistant, shot)})
        messages.append({"role": "user", "content": self._shown(self._render(self.template.user, seen))})
        return messages

    @property
    def system(self) -> str | None:
        return self.template.system if self.system_prompt is None else self.system_prompt

    def _render(self, text: str, seen: Mapping[str, Any]) -> str:
        try:
            return _compiled(text).render(**seen)
        except (jinja2.TemplateError, *_OF_EXPRESSIONS) as error:
            raise ValueError(
                f"template={self.name!r} cannot be rendered: {error}. This part of it may use "
                f"{', '.join(sorted(map(str, seen)))}."
            ) from error

    def _shown(self, text: str) -> str:
        if not text.strip():
            raise ValueError(f"template={self.name!r} makes an empty prompt of it. Check the template's conditions.")
        return text


def make_prompter(
    template: str | Mapping[str, str],
    system_prompt: str | None = None,
    few_shot: Sequence[Mapping[str, str]] | str | None = None,
) -> Prompter:
    """The template that a user names, with what it says.

    A name of `TEMPLATES`, Jinja text or a path to a `.jinja` file of a plain-text prompt, or a mapping of `system`,
    `user` and `assistant` (Jinja) for a conversation.

    Raises:
        ValueError: there is no such template or file, its Jinja is wrong, or it has no place for what is given.
    """
    if isinstance(template, Mapping):
        unknown = [key for key in template if key not in ("system", "user", "assistant")]
        if unknown or "user" not in template:
            raise ValueError(f"template has the keys {list(template)}: give user, and optionally system and assistant.")
        given = {key: text for key, text in template.items() if text is not None}
        wrong = [key for key, text in given.items() if not isinstance(text, str)]
        if wrong or "user" not in given:
            raise ValueError(
                f"template[{(wrong or ['user'])[0]!r}] must be text, it is {template[(wrong or ['user'])[0]]!r}."
            )
        found, name = PromptTemplate(**given), "user"
        if not meta.find_undeclared_variables(_parsed(found.user, name)) - {"system_prompt", "few_shot"}:
            raise ValueError(f"template['user']={found.user!r:.80} does not show the problem: write {{{{ problem }}}}.")
    elif not isinstance(template, str):
        raise TypeError(f"template={template!r} must be text or a mapping; known are {', '.join(TEMPLATES)}.")
    else:
        found, name = _named(template), template
    for text in (found.text, found.user, found.assistant):
        _parsed(text, name)
    shots = () if few_shot is None else tuple(_shots(few_shot))
    if found.text:
        used = meta.find_undeclared_variables(_parsed(found.text, name))
        for field_name, is_given in (("system_prompt", system_prompt is not None), ("few_shot", bool(shots))):
            if is_given and field_name not in used:
                raise ValueError(
                    f"{field_name} is given, but template={name!r:.80} has no place for it: write "
                    f"{{{{ {field_name} }}}} into the template, or leave {field_name} out."
                )
        if "problem" not in used and not used - {"system_prompt", "few_shot"}:
            raise ValueError(f"template={name!r:.80} does not show the problem: write {{{{ problem }}}} into it.")
    return Prompter(found, system_prompt, shots, name)


def _named(template: str) -> PromptTemplate:
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" in template or "{%" in template:
        return PromptTemplate(text=template)
    path = Path(template).expanduser()
    if path.suffix == ".jinja":
        try:
            return PromptTemplate(text=path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"template={template!r} cannot be read: {error}") from error
    near = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"template={template!r} is not known{hint}: give one of {', '.join(TEMPLATES)}, Jinja text such as "
        "'Q: {{ problem }}\\nA:', or a path to a .jinja file."
    )


def _shots(few_shot: Sequence[Mapping[str, str]] | str) -> list[Mapping[str, str]]:
    where = "few_shot"
    rows: Sequence[Any] = []
    if isinstance(few_shot, str):
        where = f"few_shot={few_shot!r}"
        try:
            lines = Path(few_shot).expanduser().read_text(encoding="utf-8-sig").split("\n")
            rows = [_line(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{where} cannot be read: {error}. Give a JSON Lines file of {{problem, answer, solution}}."
            ) from error
        if not rows:
            raise ValueError(f"{where} has no examples: it is empty. Write one per line, or leave few_shot out.")
    else:
        given: Any = few_shot
        if not isinstance(given, Sequence):
            raise TypeError(f"few_shot={given!r:.80} must be a list of examples, or a JSON Lines file of them.")
        rows = given
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(_said(row.get(key)) for key in ("problem", "answer")):
            raise ValueError(
                f"{where}, row {index} is {str(row)[:80]}: an example has problem and answer, and optionally solution."
            )
    return [{"solution": "", **{key: _said(value) for key, value in row.items()}} for row in rows]


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error


def _said(value: Any) -> str:
    """A value of an example as text; "" of what is not there."""
    return "" if value is None else str(value) if str(value).strip() else ""


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def _parsed(text: str, name: str) -> nodes.Template:
    try:
        _compiled(text)  # finds filters and tests that there are not, too
        return _ENVIRONMENT.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template={name!r:.80}, line {error.lineno}, is no Jinja: {error.message}") from error
