"""Fields of `GRPOConfig` about which prompts are trained on, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .config_rules import Rule, number

CURRICULA = ("pass_rate",)

_RULES = (
    Rule("curriculum_floor", number(lambda v: 0 <= v <= 1), "a number in [0, 1]", "1 is uniform; the default is 0.1"),
    Rule(
        "curriculum_decay", number(lambda v: 0 < v <= 1), "a number in (0, 1]", "1 never forgets; the default is 0.99"
    ),
)


@dataclass
class CurriculumFields:
    """What `curriculum` and the fields that go with it mean."""

    curriculum: str | None = field(
        default=None,
        metadata={
            "help": "How prompts are chosen. If unset, all equally often. 'pass_rate': those most likely to have both "
            "passing and failing completions, by Thompson sampling from a Beta posterior of every prompt's pass rate. "
            "A dataset's column `pass_rate` (and `samples`), as `trl-grpo difficulty` writes it, is taken as evidence."
        },
    )
    curriculum_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function by which a completion passes: where it gives at least 1.0. If unset, "
            "`accuracy_reward` where it is among them, or the only one."
        },
    )
    curriculum_floor: float = field(
        default=0.1, metadata={"help": "Share of a generation's prompts that are drawn uniformly, whatever is known."}
    )
    curriculum_decay: float = field(
        default=0.99,
        metadata={
            "help": "What the evidence about all prompts is multiplied by after each generation, for the policy moves: "
            "at 0.99 it weighs half after 69 generations."
        },
    )


def curriculum_problems(config: Any) -> Iterator[str]:
    """One line for every field of `CurriculumFields` that cannot be used as given."""
    chosen = config.curriculum
    if chosen is not None and chosen not in CURRICULA:
        yield (
            f"curriculum={chosen!r} must be one of {', '.join(map(repr, CURRICULA))}, or unset: prompts are then "
            "trained on equally often. Unset it, or set 'pass_rate'."
        )
    for rule in _RULES:
        if (problem := rule.problem(getattr(config, rule.field))) is not None:
            yield problem
    name = config.curriculum_reward
    if name is not None and (not isinstance(name, str) or not name):
        yield f"curriculum_reward={name!r} must be the name of a reward function. Leave it unset for accuracy_reward."
    if chosen is None:
        for option in ("curriculum_reward", "curriculum_floor", "curriculum_decay"):
            value, default = getattr(config, option), CurriculumFields.__dataclass_fields__[option].default
            if value != default:
                yield f"{option}={value!r} has an effect only with curriculum='pass_rate'. Set that, or leave it unset."
    elif config.shuffle_dataset is False:
        yield (
            f"shuffle_dataset=False must not come with curriculum={chosen!r}, which chooses the order of the prompts. "
            "Leave shuffle_dataset as it is, or unset curriculum."
        )
