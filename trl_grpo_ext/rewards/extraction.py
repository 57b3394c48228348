r"""Where the answer stands in a text: in a model's completion, and in a dataset's gold column.

Everything here is linear in the length of the text, however hostile: a completion may be megabytes of open braces.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence

from trl_grpo_ext.rewards.boxes import has_box, last_boxed, unclosed_box
from trl_grpo_ext.rewards.formulas import MAX_ANSWER_CHARS, formulas, is_prose, without_formulas
from trl_grpo_ext.rewards.notation import normalise
from trl_grpo_ext.rewards.numeric import is_unit, parse_quantity

_ANSWER = (
    r"(?:\banswers?\b|\br[ée]ponse\b|\brespuesta\b|\bantwort\b|\bresposta\b|\brisposta\b|\bответ\w*|答案|答え|答(?=[:：])"
    r"|उत्तर|الجواب|الإجابة)"
)
_IS = r"(?:\b(?:is|are|est|es|ist|è|é|equals)\b|[:：=]|是|为|為|は|है|هو|هي|[-–—](?=\s))"
_ANSWER_IS = re.compile(
    rf"{_ANSWER}(?:[\s*_]*|,?\s+(?:to|for|in|of|based|given|after|rounded)\b[^.!?\n$\\:]{{0,60}}?\s){_IS}[\s*_:：]*",
    re.IGNORECASE,
)
_FINAL_ANSWER_IS = re.compile(r"\bfinal answer\b(?:[\s*_]*|[^.!?\n$\\]{0,100}?\s)(?:is\b|:)[\s*_:]*", re.IGNORECASE)
# The bold mark that opens a number is no end: Natalia sold **72** clips
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\*\*(?!\s?[-$\\\d])|\n|[。！？]|<\|")
_STATES_NOTHING = re.compile(
    r"(?:correct|reasonable|verified|confirmed|as follows|(?:given )?below|obtained|found)\b", re.I
)
_QUOTES = " \t\r\n\"'`*_“”"

_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?<!\d[.,])"  # not the tail of a name (x2) or of another number
    r"(?:(?<![\w)\]}])[-+\u2212])?(?:\\?[$€£])?[-\u2212]?"
    r"(?:\\[dt]?frac\{-?\d+\}\{-?\d+\}|\d+ \d+/\d+|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\\?%)?"
)
_TRIVIAL = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?")
_AND = re.compile(r"\s{0,8}(?:,?\s{0,8}(?:and|or)\b|[,;])\s{0,8}(?=\$|\\[(\[])")
_SCALE = re.compile(r"\s*(?:\\?%|percent\b|(?:(?:hundred|thousand|million|billion|trillion|dozen)\b\s*)+)")
_LEADING_WORDS = re.compile(
    r"(?:(?:approximately|about|around|roughly|exactly|only|just|simply|equal to|that)\s+)+", re.I
)
_REASON = re.compile(r"[,;]?\s+(?:because|since|which|whereas|meaning)\b|[,;]\s+(?:as|so|i\.e\.|that is)\b|;\s")
_WHICH_IS = re.compile(
    r",?\s+which\s+(?:is|are|equals|makes|gives|comes to|amounts to)(?:\s+equal\s+to)?\s+(?=[-+$\\\d])", re.I
)
_GOES_ON = re.compile(  # the number is not the whole of it: 3 (x + 1), 2 or 3, 12 boys and 5 girls, 3 times 5
    r"\s*[-+*/=^\\{\[]|\s*\((?![^()]*[A-Za-z]{3})|\s*,?\s*(?:or|and|,)\s*\$?\d"
    r"|\s+[A-Za-z]+,?\s+(?:and|or)\s+\$?\d|\s+[A-Za-z]+\s*[*/+=×]"
    r"|\s+(?:plus|minus|times|over|(?:divided|multiplied) by)\s+\$?\d"
)
_UNIT_WORD = re.compile(r"\s*([A-Za-z]{1,16})(?![A-Za-z])")
_BRACKET = re.compile(r"\s+\((?=[^()]*[A-Za-z]{3})")


def extract_gold(text: str) -> str | None:
    r"""The gold answer in a dataset's own form, or None where there is none to be read.

    The inside of the last `<answer>..</answer>` if there is one; in it, what follows the last `####` on its line
    (GSM8K), or else the last `\boxed{...}` (MATH), or else, of prose, what follows its last "the answer is", or else
    the text itself. None for a blank result, for a `\boxed` that was cut off within another brace, and for a plain text
    longer than `MAX_ANSWER_CHARS`.
    """
    text = last_answer_block(text) or text
    if "####" in text:
        answer = after_hashes(text)
    elif has_box(text):
        answer = last_boxed(text) or unclosed_box(text)
    else:
        stated = (after_final_answer(text) or after_answer_is(text)) if is_prose(text) else None
        answer = stated or text.strip()
    return answer if answer and len(answer) <= MAX_ANSWER_CHARS else None


def is_marked(text: str) -> bool:
    r"""Whether a text marks its answer (`<answer>`, `####`, `\boxed`, "the answer is") or is short enough to be one."""
    marked = "####" in text or last_answer_block(text) is not None or has_box(text)
    return marked or not is_prose(text) or len(text.split()) < 3 or _ANSWER_IS.search(text) is not None


def extract_prediction(text: str, extract_from: Sequence[str] | None = None) -> str | None:
    r"""The final answer of a completion, or None if it states none.

    Looked for in what follows the thinking (see `after_thinking`), in the places named in `extract_from`, in that
    order; by default all of `EXTRACT_FROM`:

    1. "answer_tag": the last `<answer>..</answer>`, narrowed by rules 2 to 5 to the answer it holds;
    2. "final_answer": what follows the last "the final answer is", if no box and no `####` comes after it;
    3. "boxed": the last `\boxed{...}`, and boxes joined to it: `\boxed{2} and \boxed{3}` is the list 2, 3;
    4. "hashes": what follows the last `####` on its line;
    5. "answer_is": what follows the last "the answer is" or "answer:" (also in some other languages): a formula, the
       number it begins with, or else the last formula or number of the sentence;
    6. "formula": a text that is nothing but one formula or quantity, or the last formula that no number follows
       (`$..$`, `\(..\)`, `\[..\]`);
    7. "last_number": the last number and its unit, or, if its sentence begins with the result of the last equation,
       that result ("... = 34. So it takes 34 hours in 4 weeks.").

    Raises:
        ValueError: `extract_from` names a place that is not among these.
    """
    places = EXTRACT_FROM if extract_from is None else extract_from
    unknown = [place for place in places if place not in EXTRACT_FROM]
    if unknown:
        raise ValueError(f"`extract_from` names {unknown}: choose from {EXTRACT_FROM}.")
    final = after_thinking(text)
    for place in places:
        answer = _PLACES[place](final)
        if answer:
            return answer if len(answer) <= MAX_ANSWER_CHARS else last_number(answer)
    return None


def after_thinking(text: str) -> str:
    """What follows the last `</think>`.

    Where a `<think>` never closes, what precedes it, and the last `<answer>..</answer>` in it: to state the answer ends
    the thinking, even if the tag was forgotten. A block before a `</think>` is part of the thinking.
    """
    before, opened, thinking = text.rpartition("</think>")[2].partition("<think>")
    block = last_answer_block(thinking) if opened else None
    return f"{before}<answer>{block}</answer>" if block else before


def last_answer_block(text: str) -> str | None:
    """The inside of the last `<answer>..</answer>` that is not blank, stripped."""
    end = text.rfind("</answer>")
    while end != -1:
        start = text.rfind("<answer>", 0, end)
        if start == -1:
            return None
        inside = text[start + len("<answer>") : end].strip()
        if inside:
            return inside
        end = text.rfind("</answer>", 0, start)
    return None


def after_hashes(text: str) -> str | None:
    """What follows the last `####` on its line, stripped; None without one."""
    _, hashes, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0].strip() or None if hashes else None


def after_final_answer(text: str) -> str | None:
    """What follows the last "the final answer is", if that is a formula or a number and no other mark comes later."""
    match = _last_match(_FINAL_ANSWER_IS, text)
    if match is None or has_box(text[match.end() :]) or text.find("####", match.end()) != -1:
        return None
    answer = _beginning(text[match.end() :])
    return answer if answer and not is_prose(answer) else None


def after_answer_is(text: str) -> str | None:
    """What follows the last "the answer is" or "answer:", up to the end of its formula or sentence, narrowed.

    "The answer is correct" states none. Nor does "Answer:" before a calculation of several sentences.
    """
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        if _STATES_NOTHING.match(text, match.end()):
            continue
        rest = text[match.end() :]
        return None if match[0].rstrip(" *_").endswith((":", "：")) and _calculates(rest) else _beginning(rest)
    return None


def _calculates(text: str) -> bool:
    """Whether a paragraph begins with a sentence that has a number in it, but not as its first word, and goes on."""
    paragraph = text.lstrip(_QUOTES).split("\n", 1)[0]
    end = re.search(r"[.!?]\s+\S", paragraph)
    if end is None or _NUMBER.match(paragraph) or next(formulas(paragraph), (1,))[0] == 0:
        return False
    return re.search(r"\d", paragraph[: end.start()]) is not None


def closing_formula(text: str) -> str | None:
    r"""A text that is one formula or quantity, or the last formula that is more than a name, if no number follows."""
    text = text.strip()
    if 0 < len(text) <= MAX_ANSWER_CHARS and "\n" not in text:
        if not is_prose(without_formulas(text)):
            return text if re.search(r"\w", text) else None
        if parse_quantity(normalise(text)) is not None:  # 5 million
            return text
    last = None
    for start, end, inside in formulas(text):
        if not _TRIVIAL.fullmatch(inside):
            last = (start, end, inside)
    if last is None or re.search(r"\d", without_formulas(text[last[1] :])):
        return None
    return last[2]


def last_number(text: str) -> str | None:
    r"""The last number as it is written: sign, currency, thousands separators, a/b, \frac{a}{b}, percent sign."""
    match = _last_match(_NUMBER, text)
    return match[0] if match else None


def closing_number(text: str) -> str | None:
    """The last number and its unit, or the result of the last equation if the last one's sentence begins with that."""
    last, result = _last_match(_NUMBER, text), _last_match(_RESULT, text)
    if last is None:
        return None
    if result is None or result.end() >= last.end():
        return _with_unit(last, text)
    sentence = re.split(r"[.!?]\s|[。！？\n]|\\\]", text[result.end() : last.start()])[-1]
    first = _NUMBER.search(sentence)
    if first and _digits(first[0]) == _digits(result["number"]):
        return _with_unit(first, sentence)
    return _with_unit(last, text)


def _with_unit(number: re.Match[str], text: str) -> str:
    """A number in running text with its scale and its unit, if these follow it: `5 million`, `30 minutes`."""
    scale = _SCALE.match(text, number.end())
    end = scale.end() if scale else number.end()
    word = _UNIT_WORD.match(text, end)
    end = word.end() if word and is_unit(word[1]) else end
    return text[number.start() : end].rstrip()


_RESULT = re.compile(rf"=\s*(?P<number>{_NUMBER.pattern})")


def _answer_block(text: str) -> str | None:
    block = last_answer_block(text)
    if block is None:
        return None
    for find in (after_final_answer, last_boxed, after_hashes, after_answer_is):
        answer = find(block)
        if answer:
            return answer
    if len(block) > MAX_ANSWER_CHARS or "\n" in block:
        return closing_formula(block) or closing_number(block)
    return _narrowed(block)


def _beginning(text: str) -> str | None:
    """The formulas that a text begins with, or else its first sentence, narrowed."""
    text = text.lstrip(_QUOTES).removeprefix('\\"').lstrip(_QUOTES.replace("*", ""))
    formula = _leading_formulas(text)
    if formula:
        return formula
    end = _SENTENCE_END.search(text)
    return _narrowed(text[: end.start() if end else None].strip(_QUOTES).replace("**", "")) or None


def _leading_formulas(text: str) -> str | None:
    r"""`$x = 1$ or $x = 2$` where a text begins with it; not `$18 and $`, which is money."""
    spans = formulas(text)
    first = next(spans, None)
    if first is None or first[0] != 0:
        return None
    _, end, inside = first
    is_list = False
    for start, following_end, _ in spans:
        joint = _AND.match(text, end)
        if not joint or joint.end() != start:
            break
        end, is_list = following_end, True
    scale = _SCALE.match(text, end)
    return (text[:end] if is_list else inside) + (scale[0].rstrip() if scale else "")


def _narrowed(clause: str) -> str | None:
    """The answer in a sentence that states it: the number it begins with, the last formula or number, or all of it."""
    if len(clause) > 4 * MAX_ANSWER_CHARS:
        return closing_number(clause)
    if not is_prose(without_formulas(clause)):
        return clause
    calculated = _WHICH_IS.search(clause)
    if calculated and not _is_number(clause[: calculated.start()]):  # the sum of 3 and 4, which is 7
        clause = clause[calculated.end() :]
    reason = _REASON.search(clause, 1)
    clause = clause[: reason.start()].rstrip(",;: ") if reason else clause
    number = _leading_number(clause)
    if number:
        rest = clause[number.end() :]
        bracket = _BRACKET.search(rest)
        rest = rest[: bracket.start()] if bracket else rest
        scale = _SCALE.match(rest)
        has_more = re.search(r"\d", rest) or len(rest.split()) > 3
        return number[0] + (rest.rstrip(",;: ") if not has_more else scale[0].rstrip() if scale else "")
    if not is_prose(without_formulas(clause)) or not re.search(r"\d|\$|\\[(\[]", clause):
        return clause
    return closing_formula(clause) or closing_number(clause) or clause


def _leading_number(clause: str) -> re.Match[str] | None:
    """The number that a clause begins with, unless it is only the first part of something."""
    words = _LEADING_WORDS.match(clause)
    number = _NUMBER.match(clause, words.end() if words else 0)
    return number if number and not _GOES_ON.match(clause, number.end()) else None


def _is_number(clause: str) -> bool:
    return _leading_number(clause) is not None or not is_prose(without_formulas(clause))


def _hashes(text: str) -> str | None:
    answer = after_hashes(text)
    # A heading of that level ("#### Conclusion") is no answer, unless nothing follows it.
    return None if answer and is_prose(answer) and not text.rstrip().endswith(answer) else answer


def _digits(number: str) -> str:
    return re.sub(r"[^\d./-]", "", number)


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0] if last else None


_PLACES: dict[str, Callable[[str], str | None]] = {
    "answer_tag": _answer_block,
    "final_answer": after_final_answer,
    "boxed": last_boxed,
    "hashes": _hashes,
    "answer_is": after_answer_is,
    "formula": closing_formula,
    "last_number": closing_number,
}
EXTRACT_FROM = tuple(_PLACES)
