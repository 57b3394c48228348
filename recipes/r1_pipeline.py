r"""DeepSeek-R1's four stages in miniature (arXiv:2501.12948, §2.3), and DeepSeekMath's iterative GRPO.

Command (one core, about 10 minutes):

    python recipes/r1_pipeline.py
    python recipes/r1_pipeline.py --smoke        # every stage for two steps, in seconds; its figures say nothing

The task is the quickstart's additions with words in the thinking, a Korean or an English one behind each column, and
a second kind of prompt, in which a number is missing and "?" is the honest answer:

    475+386=    <think>5+6+0=11 올림 7+8+1=16 carry 4+3+1=8 다음</think><answer>861</answer>
    475+=       <think>다음</think><answer>?</answer>

1. Cold start: SFT of a random model on worked additions in mixed languages, until it solves a third (R1: thousands of
   long chains of thought).
2. Reasoning-oriented GRPO: accuracy + form + language consistency (R1 §2.3.2; here the share of Korean letters).
3. Rejection sampling: completions drawn from stage 2 on practice problems; those that are right, in form and in one
   language are kept, one per problem, and a few worked prompts of the second kind are added (R1: 600,000 + 200,000).
   SFT on them, from the model of stage 1: R1 goes back to its base model, which here knows nothing yet.
4. GRPO for all scenarios: both kinds of prompts, with a general reward for the second one.

Beside it, from the model of stage 1: GRPO with a KL to a fixed reference, and iterative GRPO (DeepSeekMath,
arXiv:2402.03300, Algorithm 1), in which each of three rounds begins with the reference set to the policy.

Adapters are merged after stages 2 and 4, in float32: the next stage trains all weights (SFT), as R1 does.
Writes `docs/r1-pipeline.md` and `docs/r1-pipeline.json`. Number to expect: the table there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from embedded_task import MAX_COMPLETION_LENGTH, make_model, make_splits, make_tokenizer, operands, worked_addition
from peft import LoraConfig
from quickstart import WARM_UP_GOAL, WatchAccuracy, common_arguments, quiet_libraries
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trl_grpo_ext import GroupSampler, GRPOConfig, GRPOTrainer, accuracy_reward, think_answer_format_reward
from trl_grpo_ext.rewards import LanguageConsistencyReward

WORDS = {True: ("올림", "carry"), False: ("다음", "next")}  # behind a column that carries, or does not; Korean, English
LANGUAGE = "ko"
HERE = Path(__file__).resolve().parent
console = Console(markup=False, highlight=False)
korean_reward = LanguageConsistencyReward(LANGUAGE)


def honest_reward(completions: Sequence[str], missing: Sequence[bool], **columns: Any) -> list[float | None]:
    """The general reward: 1 for "?" where a number is missing, 0 for a made-up one; None for other prompts."""
    return [
        float(text.partition("<answer>")[2].partition("</answer>")[0] == "?") if lacks else None
        for text, lacks in zip(completions, missing, strict=True)
    ]


def worked(a: int, b: int, rng: random.Random) -> str:
    """`worked_addition` with a word behind each column, in a language drawn for each."""
    thinking, answer = worked_addition(a, b).removeprefix("<think>").split("</think>")
    columns = [f"{column} {rng.choice(WORDS[int(column.split('=')[1]) > 9])}" for column in thinking.split()]
    return f"<think>{' '.join(columns)}</think>{answer}"


def honest(rng: random.Random) -> str:
    """A worked prompt of the second kind, in a language drawn for it."""
    return f"<think>{rng.choice(WORDS[False])}</think><answer>?</answer>"


@dataclass(frozen=True, slots=True)
class Data:
    """Rows with `prompt`, `solution`, `missing`; in `cold_start` and `demonstrations` a `completion` as well."""

    cold_start: list[dict[str, Any]]
    practice: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]]  # of the second kind, for stage 3
    practice_missing: list[dict[str, Any]]
    held_out_missing: list[dict[str, Any]]


def make_data(seed: int) -> Data:
    """All splits; no number is missing from the same prompt in two of them."""
    splits, rng = make_splits(seed), random.Random(seed)

    def additions(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        return [{"prompt": row["prompt"], "solution": row["solution"], "missing": False} for row in rows]

    cold_start = additions(splits.warm_up)
    for row in cold_start:
        row["completion"] = worked(*operands(row["prompt"]), rng)
    numbers = rng.sample(range(10, 1000), 600)
    lacking = [{"prompt": f"{number}+=", "solution": None, "missing": True} for number in numbers]
    demonstrations = [row | {"completion": honest(rng)} for row in lacking[:60]]
    return Data(
        cold_start,
        additions(splits.practice),
        additions(splits.validation),
        additions(splits.held_out),
        demonstrations,
        lacking[60:500],
        lacking[500:],
    )


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of everything."""

    cold_start_steps: int = 600  # at most
    grpo_steps: int = 150
    completions: int = 128  # per step
    rejection_prompts: int = 800
    rejection_samples: int = 4
    sft_epochs: int = 2
    held_out: int = 400


SMOKE = Effort(2, 2, 16, 8, 2, 1, 8)


def complete(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], count: int, *, greedy: bool
) -> list[str]:
    """So many completions of each row's prompt, a row's next to each other."""
    ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    drawn = GroupSampler(model, tokenizer).generate(ids, count, max_new_tokens=MAX_COMPLETION_LENGTH, greedy=greedy)
    return tokenizer.batch_decode(drawn.completion_ids, skip_special_tokens=True)


def judge(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Data, count: int) -> dict[str, float]:
    """Greedy completions of held-out prompts of both kinds; shares of 1."""
    rows, lacking = data.held_out[:count], data.held_out_missing[:count]
    texts, others = (complete(model, tokenizer, some, 1, greedy=True) for some in (rows, lacking))
    languages = [share for share in korean_reward(texts) if share is not None]
    return {
        "accuracy": mean(accuracy_reward(texts, solution=[row["solution"] for row in rows])),
        "format_rate": mean(think_answer_format_reward(texts)),
        "language": mean(languages) if languages else 0.0,
        "honest": mean(value or 0.0 for value in honest_reward(others, [True] * len(others))),
    }


def sft(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], out: Path, seed: int, **settings: Any
) -> Any:
    """SFT of all weights on the completions; returns the model."""
    callbacks = settings.pop("callbacks", [])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common_arguments(out, seed), per_device_train_batch_size=32, completion_only_loss=True, **settings
        ),
        train_dataset=Dataset.from_list(rows).select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def grpo(start: Path, rows: list[dict[str, Any]], out: Path, seed: int, effort: Effort, **settings: Any) -> Any:
    """GRPO of an adapter on the model in `start`; returns the model with the adapter merged into it, in float32."""
    trainer = GRPOTrainer(
        model=str(start),
        reward_funcs=[accuracy_reward, think_answer_format_reward, korean_reward, honest_reward],
        args=GRPOConfig(
            **common_arguments(out, seed),
            max_steps=effort.grpo_steps,
            per_device_train_batch_size=effort.completions,
            num_generations=8,
            max_completion_length=MAX_COMPLETION_LENGTH,
            learning_rate=1.5e-3,
            warmup_steps=5,
            logging_steps=max(1, effort.grpo_steps // 5),
            reward_weights=[1.0, 1.0, 0.5, 1.0],
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.merge_and_unload()


def rejection_sample(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], samples: int, *, keep_all: bool
) -> list[dict[str, Any]]:
    """For each problem the first completion that is right, in form and in one language, if there is one."""
    texts = complete(model, tokenizer, rows, samples, greedy=False)
    repeated = [row for row in rows for _ in range(samples)]
    right = accuracy_reward(texts, solution=[row["solution"] for row in repeated])
    form, language = think_answer_format_reward(texts), korean_reward(texts)
    kept: dict[str, dict[str, Any]] = {}
    for row, text, *good in zip(repeated, texts, right, form, language, strict=True):
        if keep_all or all(value == 1.0 for value in good):
            kept.setdefault(row["prompt"], row | {"completion": text})
    if not kept:
        raise RuntimeError(
            f"rejection sampling kept none of {len(texts)} completions: stage 2 has not learned the task. Give it more "
            "steps, or try another --seed."
        )
    return list(kept.values())


def run(seed: int, out: Path, effort: Effort, smoke: bool) -> list[dict[str, Any]]:
    """All stages; a row of figures for each."""
    data = make_data(seed)
    tokenizer = make_tokenizer("0123456789+= ?", [word for pair in WORDS.values() for word in pair])
    table: list[dict[str, Any]] = []
    started = time.perf_counter()

    def finish(stage: str, model: Any, folder: str | None = None, note: str = "") -> None:
        nonlocal started
        figures = judge(model, tokenizer, data, effort.held_out)
        table.append({"stage": stage, **figures, "seconds": time.perf_counter() - started, "note": note})
        console.print(
            f"{stage}: "
            + ", ".join(f"{name} {value:.1%}" for name, value in figures.items())
            + (f"; {note}" * bool(note))
        )
        if folder is not None:
            shutil.rmtree(out / folder, ignore_errors=True)
            model.save_pretrained(out / folder)
            tokenizer.save_pretrained(out / folder)
        started = time.perf_counter()

    watch = WatchAccuracy(tokenizer, data.validation)
    cold = sft(
        make_model(tokenizer, seed),
        tokenizer,
        data.cold_start,
        out / "sft",
        seed,
        max_steps=effort.cold_start_steps,
        learning_rate=1.5e-3,
        warmup_steps=20,
        callbacks=[watch],
    )
    if watch.accuracy < WARM_UP_GOAL and not smoke:
        raise RuntimeError(f"the cold start ended with {watch.accuracy:.0%} right: try another --seed")
    finish("1 cold-start SFT", cold, "stage-1")

    second = grpo(out / "stage-1", data.practice, out / "grpo", seed, effort)
    finish("2 reasoning-oriented GRPO", second, "stage-2")

    chosen = data.practice[: effort.rejection_prompts]
    kept = rejection_sample(second, tokenizer, chosen, effort.rejection_samples, keep_all=smoke)
    rows = kept + data.demonstrations
    third = sft(
        AutoModelForCausalLM.from_pretrained(out / "stage-1"),
        tokenizer,
        rows,
        out / "sft",
        seed,
        num_train_epochs=effort.sft_epochs,
        learning_rate=5e-4,
        warmup_steps=5,
    )
    note = f"{len(kept)} of {len(chosen)} problems kept, {len(data.demonstrations)} prompts of the second kind"
    finish("3 rejection sampling and SFT", third, "stage-3", note)

    mixed = data.practice + data.practice_missing
    fourth = grpo(out / "stage-3", mixed, out / "grpo", seed, effort)
    finish("4 GRPO for all scenarios", fourth, "stage-4")

    for stage, rounds in (("from 1: GRPO, fixed reference", 1), ("from 1: iterative GRPO, 3 rounds", 3)):
        rounds = min(rounds, effort.grpo_steps)
        start = out / "stage-1"
        finish(stage, grpo(start, data.practice, out / "grpo", seed, effort, beta=0.04, reference_rounds=rounds))
    return table


def report(table: Sequence[dict[str, Any]], seed: int, effort: Effort, command: str, docs: Path) -> str:
    """`r1-pipeline.md` and the figures; returns the table."""
    lines = [
        "| stage | accuracy, % | in form, % | Korean, % | honest, % | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        shares = " | ".join(f"{100 * row[name]:.1f}" for name in ("accuracy", "format_rate", "language", "honest"))
        lines.append(f"| {row['stage']} | {shares} | {row['seconds']:.0f} |")
    text = "\n".join(lines)
    notes = "".join(f"\nStage {row['stage']}: {row['note']}.\n" for row in table if row["note"])
    docs.mkdir(parents=True, exist_ok=True)
    kept = {"command": command, "seed": seed, "effort": asdict(effort), "stages": list(table)}
    (docs / "r1-pipeline.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    (docs / "r1-pipeline.md").write_text(
        f"""# R1's stages in miniature

Written by `{command}`; `recipes/r1_pipeline.py` says what each stage is.

{text}
{notes}
Greedy completions of held-out prompts: accuracy, form and the share of Korean letters on {effort.held_out} additions,
honesty ("?" where a number is missing) on at most 100 prompts of the second kind, which only stages 3 and 4 have seen.
One seed of a 0.9M-parameter model: it shows what each stage changes, not how much it would on a real one. Seconds are
the clock's, whatever else the machine did.
""",
        encoding="utf-8",
    )
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/r1_pipeline"), help="models after each stage")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the report")
    parser.add_argument("--smoke", action="store_true", help="two small steps of everything; filters keep everything")
    arguments = parser.parse_args(argv)
    if arguments.smoke and arguments.docs == parser.get_default("docs"):
        arguments.docs = arguments.output_dir / "docs"
    quiet_libraries()
    torch.set_num_threads(1)
    effort = SMOKE if arguments.smoke else Effort()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    table = run(arguments.seed, arguments.output_dir, effort, arguments.smoke)
    command = f"python recipes/r1_pipeline.py --seed {arguments.seed}{' --smoke' * arguments.smoke}"
    console.print(report(table, arguments.seed, effort, command, arguments.docs))


if __name__ == "__main__":
    main()
