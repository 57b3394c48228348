"""The model card: what was trained, on what, with which rewards and settings, how good it is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..credentials import known_tokens, redacted
from .curves import FILE as CURVES_FILE
from .evaluation import Result, as_eval_results
from .run_config import FILE as CONFIG_FILE

TAGS = ("trl", "grpo", "trl-grpo-ext")
PAPER = "[DeepSeekMath](https://arxiv.org/abs/2402.03300)"
UNKNOWN_REPO = "owner/name"
_HEADING = "## Evaluation"


def model_card(
    record: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    model_name: str | None = None,
    results: Sequence[Result] = (),
    has_curves: bool = False,
    tokenizer_included: bool = False,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    tokens: Sequence[str] = (),
) -> ModelCard:
    """The card of a run, from its `run_config` and its last evaluations.

    Args:
        record: The run's `training_config.yaml`.
        repo_id: Where it is pushed to, in the lines that load it.
        model_name: The card's title; by default the repository's name.
        results: Rows of the evaluation table, which the metadata repeats as `model-index`.
        has_curves: Whether `reward_curves.svg` lies beside the card.
        tokenizer_included: Whether the repository has a tokenizer of its own.
        datasets: Ids of further datasets.
        tags: Further tags.
        base_model: The base's id; by default the record's.
        tokens: What must not be in the card, besides the tokens that `huggingface_hub` knows.
    """
    base = base_model or record["model"].get("id")
    title = model_name or (repo_id or UNKNOWN_REPO).split("/")[-1]
    with_adapter = record.get("adapter") is not None
    known = [section["id"] for section in record.get("datasets", {}).values() if "id" in section]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if with_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=sorted({*known, *datasets}) or None,
        tags=[*(_adapter_tags(record) if with_adapter else []), *TAGS, *tags],
        model_name=title if results else None,
        eval_results=as_eval_results(results) or None,
    )
    sections = [
        f"# {title}\n\n{_introduction(record, base)}",
        f"## Load it\n\n```python\n{loading_lines(record, repo_id or UNKNOWN_REPO, base, tokenizer_included)}\n```",
        _evaluation(results),
        "## Reward curves\n\n" + f"![Rewards by optimizer step]({CURVES_FILE})" if has_curves else "",
        _training(record),
        _versions(record),
    ]
    body = "\n\n".join(section for section in sections if section)
    content = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    return ModelCard(redacted(content, known_tokens(*tokens)))


def loading_lines(record: Mapping[str, Any], repo_id: str, base: str | None, tokenizer_included: bool) -> str:
    """Three lines that load model and tokenizer with plain `peft`; of an unknown base, the base has to be named."""
    if record.get("adapter") is None:
        return (
            "import transformers\n"
            f'model = transformers.AutoModelForCausalLM.from_pretrained("{repo_id}")\n'
            f'tokenizer = transformers.AutoTokenizer.from_pretrained("{repo_id}")'
        )
    if base is None:
        return (
            "import peft, transformers\n"
            'base = transformers.AutoModelForCausalLM.from_pretrained("path/to/the/base")\n'
            f'model = peft.PeftModel.from_pretrained(base, "{repo_id}")'
        )
    revision = record["model"].get("revision")
    at = f', revision="{revision}"' if revision and not tokenizer_included else ""
    return (
        "import peft, transformers\n"
        f'model = peft.AutoPeftModelForCausalLM.from_pretrained("{repo_id}")\n'
        f'tokenizer = transformers.AutoTokenizer.from_pretrained("{repo_id if tokenizer_included else base}"{at})'
    )


def _adapter_tags(record: Mapping[str, Any]) -> list[str]:
    kind = record["adapter"].get("peft_type")
    return ["peft", kind.lower()] if kind else ["peft"]


def _introduction(record: Mapping[str, Any], base: str | None) -> str:
    model = record["model"]
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{model.get('folder') or model['architecture']}`"
    revision = f" at revision `{model['revision']}`" if model.get("revision") else ""
    what = "A PEFT adapter for" if record.get("adapter") is not None else "A fine-tuned version of"
    text = f"{what} {origin}{revision}, trained with GRPO ({PAPER}) by trl-grpo-ext."
    if quantization := model.get("quantization"):
        kind = quantization.get("bnb_4bit_quant_type", "4-bit") if quantization.get("load_in_4bit") else "int8"
        text += f"\n\nThe base was quantized while loading (`{kind}`, bitsandbytes), and so the adapter was trained."
    if model.get("fingerprint"):
        text += f"\n\nFingerprint of the base's weights: `{model['fingerprint']}`"
    return text


def replace_evaluation(file: Path, results: Sequence[Result], model_name: str) -> None:
    """Put results into a card that is there: its section, and `model-index` in its metadata; the rest stays."""
    card = ModelCard.load(file)
    card.data.eval_results = as_eval_results(results) or None
    card.data.model_name = card.data.model_name or model_name
    before, heading, rest = card.text.partition(_HEADING)
    _, next_heading, after = rest.partition("\n## ")
    body = f"{before.rstrip()}\n\n{_evaluation(results)}" + (
        f"\n\n{next_heading.lstrip()}{after}" if next_heading else ""
    )
    if not heading:
        body = f"{card.text.rstrip()}\n\n{_evaluation(results)}"
    file.unlink()  # it may be a link
    file.write_text(f"---\n{card.data.to_yaml()}\n---\n\n{body.strip()}\n", encoding="utf-8")


def _evaluation(results: Sequence[Result]) -> str:
    if not results:
        return f"{_HEADING}\n\nNone was made during training."
    rows = [
        (
            result.held_out.name,
            result.metric,
            f"{result.mean:.4g}",
            "" if result.interval is None else "[{:.4g}, {:.4g}]".format(*result.interval),
            "" if result.of_base is None else f"{result.of_base:.4g}",
            "" if result.p_value is None else f"{result.p_value:.2g}",
            result.held_out.prompts or "",
            result.held_out.completions_per_prompt,
            "" if result.step is None else result.step,
        )
        for result in results
    ]
    heads = ("dataset", "metric", "mean", "95 % interval", "base", "p", "prompts", "completions each", "step")
    used = [column for column, head in enumerate(heads) if any(str(row[column]) for row in rows)]
    after = all(result.step is None for result in results)
    what = "After training, by `trl-grpo eval`" if after else "The last evaluation of training"
    text = f"{_HEADING}\n\n{what}, on held-out prompts."
    best = next((result for result in results if result.is_best), None)
    if best is not None:
        text = f"{_HEADING}\n\nThe weights are those of step {best.step}, the best of the run. On held-out prompts:"
    if any(result.p_value is not None for result in results):
        text += " p: of a paired test of the difference to the base, on the same prompts with the same random numbers."
    return f"{text}\n\n{_table([heads[c] for c in used], [[row[c] for c in used] for row in rows])}"


def _training(record: Mapping[str, Any]) -> str:
    parts = [f"## Training\n\n`{CONFIG_FILE}` has all that it takes to make the run again."]
    datasets = [
        (use, section.get("id", "not from the Hub"), section.get("split", ""), section.get("rows", ""))
        for use, section in record.get("datasets", {}).items()
    ]
    if datasets:
        parts.append(f"### Datasets\n\n{_table(('use', 'dataset', 'split', 'rows'), datasets)}")
    rewards = [(f"`{reward['name']}`", f"{reward['weight']:g}") for reward in record.get("rewards", [])]
    if rewards:
        parts.append(f"### Rewards\n\n{_table(('reward', 'weight'), rewards)}")
    settings = [(f"`{name}`", f"`{_text(value)}`") for name, value in record["training"].items()]
    parts.append(f"### Settings that are not the default\n\n{_table(('field', 'value'), settings)}")
    if record.get("adapter") is not None:
        adapter = [(f"`{name}`", f"`{_text(value)}`") for name, value in record["adapter"].items()]
        parts.append(f"### Adapter\n\n{_table(('field', 'value'), adapter)}")
    return "\n\n".join(parts)


def _versions(record: Mapping[str, Any]) -> str:
    rows = [(package, version) for package, version in record.get("versions", {}).items()]
    return f"## Versions\n\n{_table(('package', 'version'), rows)}" if rows else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
