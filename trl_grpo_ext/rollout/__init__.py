"""prompts -> G completions each: every prompt is read once, its keys and values shared by its completions."""

from .rollouts import Rollouts
from .sampler import GroupSampler
from .sampling import SamplingParams

__all__ = ["GroupSampler", "Rollouts", "SamplingParams"]
