r"""How often accuracy rewards agree with the labels of real completions: ours, math-verify and TRL's.

    python benchmarks/rewards.py                              # all files, a few minutes
    python benchmarks/rewards.py --files equivalence hendrycks
    python benchmarks/rewards.py --data path/to/data

Each row of a file has a gold answer, a completion (or another way to write an answer) and a label that says whether it
is right; rows marked as doubtful (`caution`) are left out. math-verify reads LaTeX only between delimiters, so it and
TRL's `accuracy_reward`, which calls it, are also given bare answers with dollars around them. Prints agreement and
completions per second, and keeps them in `results/rewards.json` and `RESULTS.md`; a file can be measured again alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from math_verify import parse, verify
from report import REWARD_PACKAGES, describe_machine, write_markdown
from rewards_report import print_tables
from trl.rewards import accuracy_reward as trl_accuracy_reward

from trl_grpo_ext.rewards import accuracy_reward

HERE = Path(__file__).parent
FILES = (
    "equivalence/math_verify.jsonl",
    "equivalence/lighteval.jsonl",
    "equivalence/hardverify_math.jsonl",
    "equivalence/hendrycks_is_equiv.jsonl",
    "equivalence/nemo_math_equal.jsonl",
    "completions_gsm8k_openai/solutions.jsonl.gz",
    "completions_qwen25math/math_cot_100.jsonl.gz",
    "completions_nemo_skills/output_rs.jsonl",
    "processbench/gsm8k.jsonl",
    "processbench/math.jsonl.gz",
)
LABELS = ("expected", "correct", "final_answer_correct")
MAX_BARE_CHARS = 200  # a longer text is no bare answer


def ours(gold: str, text: str) -> bool:
    return accuracy_reward([text], solution=[gold]) == [1.0]


def math_verify(gold: str, text: str) -> bool:
    return bool(verify(parse(gold), parse(text)))


def math_verify_delimited(gold: str, text: str) -> bool:
    return math_verify(delimited(gold), delimited(text))


def trl(gold: str, text: str) -> bool:
    return trl_accuracy_reward([[{"content": text}]], [gold]) == [1.0]


def trl_delimited(gold: str, text: str) -> bool:
    return trl(delimited(gold), delimited(text))


def delimited(text: str) -> str:
    """With dollars around it, if it is short and has no delimiters."""
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) or len(text) > MAX_BARE_CHARS else f"${text}$"


JUDGES: dict[str, Callable[[str, str], bool]] = {
    "ours": ours,
    "math-verify": math_verify,
    "math-verify, delimited": math_verify_delimited,
    "TRL": trl,
    "TRL, delimited": trl_delimited,
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def text_of(row: dict[str, Any]) -> str:
    """The completion; ProcessBench has it in steps."""
    key = next(key for key in ("pred", "completion", "steps") if key in row)
    return "\n\n".join(row["steps"]) if key == "steps" else row[key]


def measure(path: Path) -> dict[str, Any]:
    """Rows, and per judge how many it agrees with, how many wrong ones it pays, and seconds."""
    rows = read_rows(path)
    clear = [row for row in rows if not row.get("caution")]
    label = next(key for key in LABELS if key in rows[0])
    result: dict[str, Any] = {"rows": len(clear), "left_out": len(rows) - len(clear), "judges": {}}
    for name, judge in JUDGES.items():
        judge("1", "1")  # load what is loaded at the first use
        started = time.perf_counter()
        pairs = [(bool(row[label]), judge(row["gold"], text_of(row))) for row in clear]
        result["judges"][name] = {
            "agrees": sum(truth == verdict for truth, verdict in pairs),
            "wrong_but_paid": sum(verdict and not truth for truth, verdict in pairs),
            "seconds": round(time.perf_counter() - started, 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the files")
    parser.add_argument("--files", nargs="+", metavar="PART", help="only files with one of these in their name")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md and results/")
    options = parser.parse_args()
    chosen = [name for name in FILES if not options.files or any(part in name for part in options.files)]
    if not chosen:
        parser.error(f"--files {' '.join(options.files)} is in none of the names: {', '.join(FILES)}")
    if missing := [name for name in chosen if not (options.data / name).exists()]:
        parser.error(f"--data {options.data} has no {', '.join(missing)}: give the folder that has them")
    logging.disable(logging.WARNING)  # math-verify logs what it cannot parse
    machine = describe_machine(REWARD_PACKAGES)
    measured = {name: measure(options.data / name) for name in chosen}
    kept_in = options.results / "results" / "rewards.json"
    kept = json.loads(kept_in.read_text())["files"] if kept_in.exists() else {}
    files = {name: (kept | measured)[name] for name in FILES if name in kept or name in measured}
    report = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "files": files}
    print_tables(report)
    kept_in.parent.mkdir(parents=True, exist_ok=True)
    kept_in.write_text(json.dumps(report, indent=1) + "\n")
    write_markdown(options.results)


if __name__ == "__main__":
    main()
