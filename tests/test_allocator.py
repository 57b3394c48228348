"""Freed activations stay with the process, where glibc is asked and nobody else has decided."""

import os
import subprocess
import sys

import pytest

# Page faults of allocating, filling and freeing five times 8 MB (2,048 pages each) ten times over, once warm
SCRIPT = """
import resource, torch
from trl_grpo_ext.allocator import keep_freed_memory
print(keep_freed_memory(), keep_freed_memory())
keep = torch.ones(2**18)
def once():
    blocks = [torch.ones(2**21) for _ in range(5)]
for _ in range(10):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(script=SCRIPT, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_"))}
    process = subprocess.run(
        [sys.executable, "-c", script], env=env | environment, capture_output=True, text=True, check=True
    )
    answers, faults = process.stdout.splitlines()
    return answers, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_kept():
    answers, faults = run()
    if answers == "False False":
        pytest.skip("this C library is not glibc")
    assert answers == "True True"
    assert faults < 1000  # of 102,400 pages


def test_who_has_decided_already_is_heard():
    answers, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert answers == "False False" and faults > 50_000
    answers, _ = run(LD_PRELOAD="libjemalloc-that-is-not-there.so")
    assert answers == "False False"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_blocks_of_quantized_layers_are_handed_back():
    """Five blocks of 24 MB: kept where layers are whole, given back where they are dequantized, whoever asks later."""
    blocks = SCRIPT.replace("2**21", "3 * 2**21")
    answers, faults = run(blocks)
    if answers == "False False":
        pytest.skip("this C library is not glibc")
    assert answers == "True True" and faults < 1000
    first = blocks.replace("keep_freed_memory(), ", "keep_freed_memory(quantized=True), ")
    answers, faults = run(first)
    assert answers == "True True" and faults > 50_000
    second = blocks.replace(", keep_freed_memory()", ", keep_freed_memory(quantized=True)")
    answers, faults = run(second)
    assert answers == "True True" and faults > 50_000
