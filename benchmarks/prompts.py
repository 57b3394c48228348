"""`load_prompts` on a million synthetic rows: rows per second and memory, streamed, and cached by `datasets`.

    python benchmarks/prompts.py                    # some minutes; results/prompts.json and RESULTS.md
    python benchmarks/prompts.py --rows 50000
    python benchmarks/prompts.py --gold             # instead: the real sets, gold answers and worked solutions
    python benchmarks/prompts.py --gold --data path/to/data

Each measurement is a process of its own: a stream read once from end to end (template, normalised duplicates), the
first call without a cache, and the second call, which the cache serves. Memory is the resident set, above what it was
once the libraries were imported.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from prompts_report import print_tables
from report import describe_machine, write_markdown

HERE = Path(__file__).resolve().parent
MODES = ("streamed", "first call", "second call")
PACKAGES = ("datasets", "pyarrow")
# Source, file, and the column of its worked solution
SETS = (
    ("gsm8k", "gsm8k/train.jsonl.gz", "answer"),
    ("gsm8k", "gsm8k/test.jsonl", "answer"),
    ("math-500", "math/math500.jsonl", "solution"),
    ("math", "math/test.jsonl.gz", "solution"),
    ("svamp", "svamp/svamp.jsonl", None),
    ("aime", "aime/aime2024.jsonl", "solution"),
    ("aime", "aime/aime_1983_2023.jsonl.gz", "solution"),
    ("mgsm", "mgsm/mgsm.jsonl.gz", None),
)


def write_synthetic(path: Path, rows: int) -> None:
    """Problems of some 200 characters; every hundredth is a duplicate of the one before."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            n -= n % 100 == 99
            problem = (
                f"A baker sells {n} loaves on Monday and {n % 97} more than twice as many on Tuesday. On Wednesday the "
                f"shop is closed, and on Thursday {n % 13} loaves are given away. How many loaves leave the shop?"
            )
            answer = f"Tuesday: 2 * {n} + {n % 97}.\n#### {3 * n + n % 97 + n % 13}"
            file.write(json.dumps({"question": problem, "answer": answer}) + "\n")


def measure(mode: str, file: str, cache: str) -> dict[str, Any]:
    """Rows per second and memory of one call, in this process."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    datasets.disable_progress_bars()
    from trl_grpo_ext import PromptReport, load_prompts

    load_prompts("procedural:arithmetic", config="rows=10")  # what is loaded at the first use
    process, report = psutil.Process(), PromptReport()
    before, resident = process.memory_info().rss, []
    started = time.perf_counter()
    prompts = load_prompts(f"gsm8k:{file}", streaming=mode == "streamed", report=report)
    if mode == "streamed":
        for n, _ in enumerate(prompts):
            if n % 10_000 == 0:
                resident.append((n, process.memory_info().rss - before))
    resident.append((report.kept, process.memory_info().rss - before))
    return {
        "rows": report.read,
        "kept": report.kept,
        "duplicates": report.dropped["duplicates"],
        "seconds": round(time.perf_counter() - started, 2),
        "resident_mib": [[n, round(size / 2**20, 1)] for n, size in resident],
    }


def gold(data: Path) -> list[dict[str, Any]]:
    """Each real set: rows, golds that parse, worked solutions that the accuracy reward pays, and those it does not."""
    from trl_grpo_ext import PromptReport, accuracy_reward, load_prompts

    found = []
    for name, file, column in SETS:
        path, report = data / file, PromptReport(examples=None)
        prompts = load_prompts(f"{name}:{path}", deduplicate="off", unreadable="drop", report=report)
        entry: dict[str, Any] = {"file": file, "rows": report.read, "golds": report.kept, "worked": None, "others": []}
        if column is not None:
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
                worked = [json.loads(line)[column] for line in lines]
            rewards = accuracy_reward(worked, solution=prompts["solution"][:])
            entry["worked"] = rewards.count(1.0)
            entry["others"] = [row for row, reward in enumerate(rewards) if reward != 1.0]
        found.append(entry)
        print(entry, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="synthetic rows")
    parser.add_argument("--gold", action="store_true", help="the real sets instead")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the real sets"
    )
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md and results/")
    parser.add_argument("--measure", nargs=3, metavar=("MODE", "FILE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    kept_in = options.results / "results" / "prompts.json"
    result: dict[str, Any] = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    if options.gold:
        if not options.data.is_dir():
            parser.error(f"--data {options.data}: there is no such folder")
        result["gold"] = gold(options.data)
    else:
        result |= {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(PACKAGES), "modes": {}}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_synthetic(file, options.rows)
            for mode in MODES:
                command = [sys.executable, __file__, "--measure", mode, str(file), str(Path(folder) / "cache")]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                result["modes"][mode] = json.loads(done.stdout.splitlines()[-1])
                print(mode, result["modes"][mode]["seconds"], "s", flush=True)
    kept_in.parent.mkdir(parents=True, exist_ok=True)
    kept_in.write_text(json.dumps(result, indent=1) + "\n")
    write_markdown(options.results)
    print_tables(result)


if __name__ == "__main__":
    main()
