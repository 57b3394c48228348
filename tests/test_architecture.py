"""The rules of the house that a reader relies on: who imports whom, how long things get, and what is public."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_grpo_ext
import trl_grpo_ext.rewards

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_grpo_ext"
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))

PUBLIC = {
    "Evaluation",
    "GRPOConfig",
    "GRPOTrainer",
    "GroupSampler",
    "PromptReport",
    "RewardError",
    "Rollouts",
    "__version__",
    "accuracy_reward",
    "base_fingerprint",
    "evaluate_policy",
    "load_prompts",
    "think_answer_format_reward",
}
# Each can be used, tested and read alone: it takes plain arguments, and knows neither the others nor who calls it.
STANDALONE = ("data", "rollout", "rewards", "policy", "objective")
CALLERS = ("config", "trainer")
STANDARD_IN_OBJECTIVE = {"__future__", "typing", "dataclasses", "math", "collections.abc"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, source: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, wherever in it, as (absolute module, imported name or None for `import module`)."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # level 1 is the file's own package, which for an __init__.py is the folder as well
            package = path.relative_to(ROOT).parent.parts
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from ((module, alias.name) for alias in node.names)


def parts_of_the_package(path: Path, source: str | None = None) -> Iterator[str]:
    """The modules and folders directly under `trl_grpo_ext` that a file imports from; "" is the package itself."""
    for module, name in imports(path, source):
        head, *rest = module.split(".")
        if head == "trl_grpo_ext":
            yield rest[0] if rest else name if name is not None and name not in PUBLIC else ""


def forbidden_imports(path: Path, source: str | None = None) -> list[str]:
    """What a file of a standalone folder imports and must not: another such folder, the callers, or the public face."""
    own = path.relative_to(PACKAGE).parts[0]
    parts = set(parts_of_the_package(path, source))
    # objective is what everything else may be built on
    others = {folder for folder in STANDALONE if folder not in (own, "objective")}
    return sorted(part for part in parts if part in others or part.startswith(CALLERS) or part == "")


STANDALONE_MODULES = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in STANDALONE]


@pytest.mark.parametrize("folder", STANDALONE)
def test_folder_exists(folder: str) -> None:
    assert any(path.relative_to(PACKAGE).parts[0] == folder for path in STANDALONE_MODULES)


@pytest.mark.parametrize("path", STANDALONE_MODULES, ids=name_of)
def test_folders_do_not_import_each_other_nor_their_callers(path: Path) -> None:
    assert forbidden_imports(path) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "objective").rglob("*.py")), ids=name_of)
def test_objective_imports_torch_only(path: Path) -> None:
    for module, _ in imports(path):
        assert (
            module in STANDARD_IN_OBJECTIVE
            or module.split(".")[0] == "torch"
            or f"{module}.".startswith("trl_grpo_ext.objective.")
        ), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..rollout.sampler import GroupSampler", ["rollout"]),
        ("from .. import rewards", ["rewards"]),
        ("import trl_grpo_ext.config_checks", ["config_checks"]),
        ("def f():\n    from trl_grpo_ext.trainer import GRPOTrainer", ["trainer"]),
        ("from trl_grpo_ext import GRPOConfig", [""]),
        (
            "from .layout import x\nfrom ..objective import ratio\nfrom trl_grpo_ext.attention import y\nimport torch",
            [],
        ),
    ],
)
def test_the_import_check_sees_every_form(source: str, found: list[str]) -> None:
    assert forbidden_imports(PACKAGE / "policy" / "new.py", source) == found


def test_recipes_use_the_public_names_only() -> None:
    assert RECIPES, "there are no recipes"
    public = {"trl_grpo_ext": PUBLIC, "trl_grpo_ext.rewards": set(trl_grpo_ext.rewards.__all__)}
    for path in RECIPES:
        for module, name in imports(path):
            if module.split(".")[0] == "trl_grpo_ext":
                assert module in public, f"{name_of(path)} imports {module}"
                assert name is None or name in public[module], f"{name_of(path)} imports {name}"
        attributes = re.findall(r"\btrl_grpo_ext\.(\w+)", path.read_text(encoding="utf-8"))
        assert set(attributes) <= PUBLIC | {"rewards"}, f"{name_of(path)} uses {attributes}"


def test_public_names() -> None:
    assert set(trl_grpo_ext.__all__) == PUBLIC
    assert len(trl_grpo_ext.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(trl_grpo_ext, name) is not None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            lines = node.body[-1].end_lineno - first.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines without its docstring"


def test_no_utils() -> None:
    assert [name_of(path) for path in MODULES if re.fullmatch(r"_?(utils?|helpers?|misc|common)\.py", path.name)] == []


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
