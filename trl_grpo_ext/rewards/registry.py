"""Rewards by name, as recipes write them in YAML.

rewards:
  - {name: accuracy, weight: 1.0}
  - {name: length, weight: 0.3, max_chars: 4000}        # options beside the name
  - {name: "trl:think_format_reward"}                   # anything in trl.rewards
  - {name: "my_rewards.py:brevity", weight: 0.1}        # a function or class of a file
  - name: combine                                       # several as one
    rewards: [{name: format, weight: 0.2}, {name: accuracy}]
    gates: {accuracy: {format: 1.0}}
  - {name: safety, classifier: {name: "guard.py:Guard"}}  # an option that is itself a function
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from trl_grpo_ext.rewards.combine import combine, is_async, reward_name
from trl_grpo_ext.rewards.marks import is_in_process, is_row_wise
from trl_grpo_ext.rewards.outcome import as_number, short

# Reward functions, which take no options
_FUNCTIONS = {
    "think_answer_format": "trl_grpo_ext.rewards.format:think_answer_format_reward",
    "think_format": "trl_grpo_ext.rewards.format:think_format_reward",
}
# What makes reward functions out of options
_MAKERS = {
    "accuracy": "trl_grpo_ext.rewards.accuracy:AccuracyReward",
    "combine": "trl_grpo_ext.rewards.registry:_combine",
    "cosine_length": "trl_grpo_ext.rewards.length:CosineLengthReward",
    "countdown": "trl_grpo_ext.rewards.countdown:CountdownReward",
    "format": "trl_grpo_ext.rewards.format:FormatReward",
    "language": "trl_grpo_ext.rewards.language:LanguageConsistencyReward",
    "length": "trl_grpo_ext.rewards.length:LengthReward",
    "multiple_choice": "trl_grpo_ext.rewards.multiple_choice:MultipleChoiceReward",
    "reasoning_gym": "trl_grpo_ext.rewards.reasoning_gym:ReasoningGymReward",
    "repetition": "trl_grpo_ext.rewards.repetition:repetition_reward",
    "safety": "trl_grpo_ext.rewards.safety:SafetyReward",
    "soft_overlong": "trl_grpo_ext.rewards.length:soft_overlong_reward",
    "tag_count": "trl_grpo_ext.rewards.format:TagCountReward",
}
# Arguments that a trainer gives: no options
_GIVEN = frozenset("prompts completions completion_ids trainer_state log_extra log_metric".split())

Spec: TypeAlias = "str | Mapping[str, Any]"


def load_rewards(
    specs: Sequence[Spec], base_dir: str | Path | None = None
) -> tuple[list[Callable[..., Any]], list[float]]:
    """The reward functions that a recipe names, and their weights: what a trainer takes as `reward_funcs` and
    `reward_weights`.

    A spec is a name, or a mapping with `name`, an optional `weight` (default 1.0) and the reward's options. A name is
    one of `reward_names()`, `trl:<name in trl.rewards>`, or `<path>.py:<name in that file>`, which runs that file. An
    option that is itself a mapping with a `name` is loaded likewise.

    Args:
        specs: what a recipe's `rewards` holds.
        base_dir: the folder that relative paths of files start from; the current one by default.

    Raises:
        ValueError: an unknown name, an unknown or unfit option, or a name without what it needs; the message says
            which spec, and for a misspelt name which one is near.
        TypeError: a spec, a name, a weight or an option is of the wrong type.
        FileNotFoundError: there is no such file.
    """
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
        raise TypeError(f"`rewards` must be a list of rewards, got {short(specs)}: write `rewards: [{{name: ...}}]`.")
    folder = Path.cwd() if base_dir is None else Path(base_dir)
    loaded = [_load(spec, f"rewards[{index}]", folder) for index, spec in enumerate(specs)]
    return [function for function, _ in loaded], [weight for _, weight in loaded]


def reward_names() -> list[str]:
    """The names of this package's rewards."""
    return sorted({*_FUNCTIONS, *_MAKERS})


class FileReward:
    """A function of a Python file as a reward function that other processes can load; made by `file_reward`.

    Plain pickle finds a function by its module's name, which a file outside of any package does not have. This goes by
    the path instead: unpickled, it imports the file again. Name and marks are the function's own.
    """

    def __init__(self, function: Callable[..., Any], path: str, name: str, options: Mapping[str, Any]) -> None:
        self.function, self.path, self.name, self.options = function, path, name, dict(options)
        self.__name__ = reward_name(function)
        marked = function.func if isinstance(function, functools.partial) else function
        self.reward_is_row_wise, self.reward_runs_in_process = is_row_wise(marked), is_in_process(marked)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return file_reward, (self.path, self.name, self.options)


class AsyncFileReward(FileReward):
    """The same for an async function: TRL looks at `__call__` to tell whether to await."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self.function(*args, **kwargs)


def file_reward(path: str, name: str, options: Mapping[str, Any]) -> FileReward:
    """What a Python file calls `name`, as a reward function.

    Args:
        path: the file. It is run, once per content: an edited file is a new module, two functions of one share it.
        name: a function, or a class to be called with the options.
        options: keyword arguments, of the class or bound to the function.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not have that name, or what it names takes no such option.
        TypeError: it is not callable.
    """
    target = _attribute(_module_of_file(Path(path)), name, path)
    if inspect.isclass(target):
        target = target(**_checked_options(target, options, name))
    elif callable(target):
        target = _bound(target, options, name)
    if not callable(target):
        raise TypeError(f"{path}:{name} is no function or class, but {short(target)} ({type(target).__name__}).")
    return (AsyncFileReward if is_async(target) else FileReward)(target, path, name, options)


def _load(spec: Any, where: str, folder: Path) -> tuple[Callable[..., Any], float]:
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise TypeError(f"`{where}` is {short(spec)}: it must be a reward's name or a mapping with a `name`.")
    name, given_weight = spec["name"], spec.get("weight", 1.0)
    weight = None if isinstance(given_weight, bool) else as_number(given_weight)
    if weight is None:
        raise TypeError(f"`{where}.weight` ({name}) is {short(given_weight)}: it must be a finite number.")
    options = {
        key: _loaded_option(value, f"{where}.{key}", folder)
        for key, value in spec.items()
        if key not in ("name", "weight")
    }
    try:
        return _make(name, options, folder), weight
    except (FileNotFoundError, TypeError, ValueError) as error:
        kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"`{where}` ({name}): {error}") from error


def _loaded_option(value: Any, where: str, folder: Path) -> Any:
    """An option as it is, but for specs of rewards, alone or in a list, which are loaded."""
    if isinstance(value, Mapping) and "name" in value:
        if "weight" in value:
            raise ValueError(f"`{where}` has a `weight`, but is not part of a sum: remove it.")
        return _load(value, where, folder)[0]
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        loaded = [_load(item, f"{where}[{index}]", folder) for index, item in enumerate(value)]
        return [(item["name"].rpartition(":")[2], *pair) for item, pair in zip(value, loaded, strict=True)]
    return value


def _combine(
    rewards: Sequence[Any],
    names: Sequence[str] | None = None,
    gates: Mapping[str, Mapping[str, float]] | None = None,
    closed: float = 0.0,
    metric_name: str = "combined_reward",
) -> Callable[..., Any]:
    """`combine` for recipes, where parts come with their names and weights."""
    if not isinstance(rewards, list) or not all(isinstance(part, tuple) for part in rewards):
        raise TypeError(f"`rewards` must be a list of mappings, each with a `name`, got {short(rewards)}.")
    own_names, functions, weights = zip(*rewards, strict=True) if rewards else ((), (), ())
    titles = own_names if names is None else names
    return combine(functions, weights, names=titles, gates=gates, closed=closed, metric_name=metric_name)


def _make(name: str, options: dict[str, Any], folder: Path) -> Callable[..., Any]:
    if name.startswith("trl:"):
        return _of_trl(name.removeprefix("trl:"), options)
    path, separator, attribute = name.rpartition(":")
    if separator and path.endswith(".py"):
        return file_reward(str((folder / path).resolve()), attribute, options)
    if name in _FUNCTIONS:
        if options:
            raise ValueError(f"takes no options, got {sorted(options)}: remove them.")
        return _imported(_FUNCTIONS[name])
    if name in _MAKERS:
        maker = _imported(_MAKERS[name])
        return maker(**_checked_options(maker, options, name))
    raise ValueError(
        f"there is no such reward{_nearest(name, reward_names())}; known are {', '.join(reward_names())}, "
        f"trl:<name>, and path/to/file.py:<name>."
    )


def _of_trl(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """A function of `trl.rewards`; those named `get_...` are called with the options and return one."""
    module = importlib.import_module("trl.rewards")
    known = sorted(entry for entry in dir(module) if entry.endswith("_reward") or entry.startswith("get_"))
    if name not in known:
        raise ValueError(f"trl.rewards has no {name!r}{_nearest(name, known)}; it has {', '.join(known)}.")
    target = getattr(module, name)
    if name.startswith("get_"):
        return target(**_checked_options(target, options, name))
    return _bound(target, options, name)


def _imported(place: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give its path from the folder that the recipe is run in.")
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"trl_grpo_ext_reward_file_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as an import does: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    if not hasattr(module, name):
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        raise ValueError(f"{path} has no {name!r}{_nearest(name, public)}.")
    return getattr(module, name)


def _bound(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """The function with its options; what has no default is a column of the dataset, and none of them."""
    if not options:
        return function
    accepted = [key for key, p in inspect.signature(function).parameters.items() if p.default is not p.empty]
    _refuse_unknown(options, [key for key in accepted if key not in _GIVEN], name)
    return functools.partial(function, **options)


def _checked_options(maker: Callable[..., Any], options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The options, if the maker takes all of them and misses none."""
    parameters = inspect.signature(maker).parameters
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    _refuse_unknown(options, list(named), name)
    missing = [key for key, p in named.items() if p.default is p.empty and key not in options]
    if missing:
        raise ValueError(f"needs {', '.join(f'`{key}`' for key in missing)}: add it to the options.")
    return options


def _refuse_unknown(options: Mapping[str, Any], accepted: Sequence[str], name: str) -> None:
    for option in options:
        if option not in accepted:
            known = f"its options are {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"{name} has no option {option!r}{_nearest(str(option), accepted)}; {known}.")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
