"""`GRPOConfig`: TRL's names, defaults and meaning, three fields of our own, and every check of a value."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import torch
from trl.trainer.base_config import _BaseConfig
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from .config_checks import InvalidConfigError, refused_features, settled_problems, value_problems
from .config_curriculum import CurriculumFields
from .config_evaluation import EvaluationFields
from .config_rules import GENERATION_KEYS
from .credentials import known_tokens, redacted, without_tokens

# TRL takes booleans here; the command line hands them over as strings.
_SCALE_REWARDS = {True: "group", False: "none", "True": "group", "False": "none", "true": "group", "false": "none"}
# Fields of TRL's that may hold anything, as no value of theirs can change what this trainer computes or logs:
# how far rows are padded, how DeepSpeed ZeRO-3 (refused) generates, how images (never here) are logged.
_NO_EFFECT = frozenset({"pad_to_multiple_of", "ds3_gather_for_generation", "log_multimodal"})


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class GRPOConfig(CurriculumFields, EvaluationFields, _BaseConfig):
    r"""Settings of `GRPOTrainer`: the fields below, and all of [`~transformers.TrainingArguments`].

    Where TRL's `GRPOConfig` has a field of the same name, default and meaning are TRL's; the help text of each field
    says what it does. New here: `kl_estimator`, `kl_in_reward` and `attention_packing`. Different from TRL: `bf16`, if
    unset, is chosen by the device (TRL turns it on, which raises on a CPU), and `logging_nan_inf_filter` is off, as on
    it hides a NaN loss behind a running mean. Works with `transformers.HfArgumentParser`.

    Raises:
        InvalidConfigError: a `ValueError` with one line (field, value, rule, remedy) per field that cannot be used.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (TrainingArguments declares it so)
        *_BaseConfig._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    # Defaults that differ from those of TrainingArguments
    bf16: bool | None = _help(
        "Whether to use bfloat16 mixed precision. If unset, on where a CUDA device computes it natively and neither "
        "`fp16` nor `use_cpu` is set.",
        None,
    )
    learning_rate: float = _help("The initial learning rate for AdamW.", 1e-6)
    logging_nan_inf_filter: bool = _help("Whether to leave NaN and infinite losses out of the logged loss.", False)
    remove_unused_columns: bool = _help("Must stay off: reward functions receive the dataset's columns.", False)

    # The model and the reference model
    model_init_kwargs: dict[str, Any] | str | None = _help(
        "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of the "
        "`GRPOTrainer` is a string. Its `revision` is also used to load the processing class.",
        None,
    )
    trust_remote_code: bool = _help(
        "Whether to allow models and tokenizers that ship custom Python code, reward models' included.", False
    )
    disable_dropout: bool = _help("Whether to disable dropout in the model.", False)
    adapter_name_or_path: str | None = _help(
        "Id or path of a PEFT adapter to go on training. Its base is the `model` argument or, if that is None, the one "
        "it was trained on. Excludes `peft_config`.",
        None,
    )
    adapter_revision: str | None = _help("Branch, tag or commit of `adapter_name_or_path`.", None)

    # The data
    num_generations: int = _help(
        "Completions to sample per prompt (the group size G). The generation batch must be divisible by it.", 8
    )
    num_generations_max: int | None = _help(
        "Adaptive group size: a group whose rewards are all equal draws more completions, up to so many in all, until "
        "they differ. If unset, every group has `num_generations`.",
        None,
    )
    dynamic_sampling: bool = _help(
        "Whether a prompt whose group's rewards are all equal is replaced by another one of train_dataset, drawn at "
        "random (DAPO, arXiv:2503.14476 §3.2).",
        False,
    )
    dynamic_sampling_max_rounds: int = _help(
        "How many times prompts are replaced in one generation before the rest are given up as silent.", 5
    )
    num_generations_eval: int | None = _help(
        "Completions to sample per prompt during evaluation. If unset, `num_generations`.", None
    )
    max_completion_length: int = _help("Maximum number of tokens of a completion.", 512)
    shuffle_dataset: bool = _help("Whether to shuffle the training dataset.", True)

    # Generation
    generation_batch_size: int | None = _help(
        "Completions sampled at a time, over all processes. If unset, `per_device_train_batch_size * num_processes * "
        "steps_per_generation`. Mutually exclusive with `steps_per_generation`.",
        None,
    )
    steps_per_generation: int | None = _help(
        "Micro-batches that one generation serves. If unset, `gradient_accumulation_steps`.", None
    )
    temperature: float = _help("Temperature for sampling, and for the log-probs in the loss.", 1.0)
    top_p: float = _help("Keep the most probable tokens that together have this probability, in (0, 1].", 1.0)
    top_k: int = _help("Keep this many most probable tokens; 0 keeps all.", 0)
    min_p: float | None = _help(
        "Keep tokens with at least this probability relative to the most probable one, in [0, 1].", None
    )
    repetition_penalty: float = _help(
        "Above 1.0 discourages tokens of the prompt and of the text so far, below 1.0 encourages them.", 1.0
    )
    generation_kwargs: dict[str, Any] | str | None = _help(
        f"More sampling options, which override the fields above while sampling: {', '.join(GENERATION_KEYS)}.", None
    )
    chat_template_kwargs: dict[str, Any] | str | None = _help(
        "Keyword arguments for `apply_chat_template` when prompts are rendered.", None
    )

    # The objective
    beta: float = _help("KL coefficient. At 0.0 no reference is used. DeepSeek-R1 uses 0.001.", 0.0)
    kl_estimator: str = _help(
        "Estimator of the KL to the reference: 'k1' (log ratio), 'k2' (half its square), 'k3' (unbiased and never "
        "negative, TRL's), or 'full' (the exact KL of the whole distributions at each position).",
        "k3",
    )
    kl_in_reward: bool = _help(
        "Whether to subtract beta * KL from the reward instead of adding it to the loss. The KL is then that of 'k1', "
        "summed over the completion.",
        False,
    )
    use_bias_correction_kl: bool = _help(
        "Whether to multiply the KL term by the importance sampling ratio, so that its gradient is the unbiased "
        "reverse-KL gradient (DeepSeek-V3.2, arXiv:2512.02556).",
        True,
    )
    sync_ref_model: bool = _help(
        "Whether the reference follows the policy: every `ref_model_sync_steps` optimizer steps it becomes `alpha` * "
        "policy + (1 - `alpha`) * reference, parameter by parameter. With an adapter, of the adapter's parameters.",
        False,
    )
    ref_model_mixup_alpha: float = _help(
        "`alpha` of `sync_ref_model` (TR-DPO, arXiv:2404.09656). 1.0 sets the reference to the policy.", 0.6
    )
    ref_model_sync_steps: int = _help("Optimizer steps from one sync of `sync_ref_model` to the next.", 512)
    reference_rounds: int = _help(
        "Rounds of iterative GRPO (DeepSeekMath, arXiv:2402.03300, Algorithm 1): training is cut into so many equal "
        "parts, and each begins with the reference set to the policy. 1: the reference stays what it was.",
        1,
    )
    num_iterations: int = _help("Iterations per batch of completions (mu in the algorithm).", 1)
    epsilon: float = _help("Lower clipping range of the ratio: it is clipped below 1 - epsilon.", 0.2)
    epsilon_high: float | None = _help(
        "Upper clipping range of the ratio. If unset, `epsilon`. DAPO recommends 0.28.", None
    )
    delta: float | None = _help(
        "Upper bound of the ratio in two-sided clipping (INTELLECT-2, arXiv:2505.07291); should be above "
        "1 + epsilon_high. If unset, clipping is one-sided.",
        None,
    )
    importance_sampling_level: str = _help(
        "'token': one ratio per token. 'sequence': one per completion, its tokens' mean (GSPO, arXiv:2507.18071).",
        "token",
    )
    loss_type: str = _help(
        "How token losses are aggregated. 'grpo': mean over each completion, then over completions. 'dr_grpo': sum "
        "over a constant, max_completion_length (arXiv:2503.20783). 'dapo': mean over the tokens of the whole step "
        "(arXiv:2503.14476). 'bnpo': the same, over the tokens of this process only.",
        "dapo",
    )
    mask_truncated_completions: bool = _help(
        "Whether completions cut off at the maximum length are left out of the loss (DAPO).", False
    )

    # The rewards
    reward_weights: list[float] | None = _help("One weight per reward function. If unset, all are 1.0.", None)
    scale_rewards: str = _help(
        "What centred rewards are divided by. 'group' or True: the group's standard deviation. 'batch': that of the "
        "whole batch. 'none' or False: nothing (Dr. GRPO).",
        "group",
    )
    advantage_estimator: str = _help(
        "What a reward is compared with. 'group': the mean of its group, scaled by `scale_rewards` (GRPO). 'rloo': the "
        "mean of the others of its group (arXiv:2402.14740). 'remax': the reward of one more, greedy completion "
        "(arXiv:2310.10505). 'raft': only the best of the group is learned from (arXiv:2304.06767). 'reinforce': the "
        "mean of the batch.",
        "group",
    )
    multi_objective_aggregation: str = _help(
        "'sum_then_normalize': the weighted sum of the rewards is normalized. 'normalize_then_sum': each reward is "
        "normalized in its group first (GDPO, arXiv:2601.05242).",
        "sum_then_normalize",
    )

    # What reward functions may take before they are stopped
    reward_timeout: float = _help(
        "Seconds of wall time for the reward of a completion; over it, the completion has no reward.", 10.0
    )
    reward_memory_mb: int = _help("Megabytes that a process which runs rewards may allocate.", 1024)
    reward_workers: int | None = _help(
        "Processes that reward functions run in, where they can be pickled. If unset, one per core, 8 at most; 0 runs "
        "them in the training process, where nothing can stop one that hangs.",
        None,
    )
    reward_concurrency: int = _help("Calls of an async reward function under way at a time.", 32)
    reward_max_failure_rate: float = _help(
        "Share of a batch that a reward may fail on (raise, hang, return no finite number) before training stops.", 0.5
    )

    # How rollouts and the update are computed
    rollout_dequantize: str = _help(
        "Rollouts on a base in 4 or 8 bits. 'layer': a layer is dequantized whenever it is called. 'resident': once "
        "per generation; faster, and takes the memory of the unquantized weights while completions are drawn.",
        "layer",
    )
    attention_packing: str = _help(
        "Shared-prompt packing. 'auto': wherever a probe at start-up finds it exact, with one warning where it does "
        "not. 'on': an error where it does not. 'off': padded rows.",
        "auto",
    )

    # Logging
    log_completions: bool = _help("Whether to log (prompt, completion) pairs every `logging_steps` steps.", False)
    num_completions_to_print: int | None = _help("How many completions to print. If unset, all.", None)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _cuda_computes_bf16()
        # TRL's default asks for gradient checkpointing by its old name: nobody should be warned of a default.
        if getattr(self, "activation_checkpointing", False) is None and self.gradient_checkpointing is True:
            self.activation_checkpointing = True
        if isinstance(self.scale_rewards, bool | str):
            self.scale_rewards = _SCALE_REWARDS.get(self.scale_rewards, self.scale_rewards)

        refused = refused_features(self)
        if refused:  # TrainingArguments must not start to set these up; whatever else is wrong is said along with them
            raise InvalidConfigError(*refused, *value_problems(self))
        super().__post_init__()
        problems = value_problems(self) + settled_problems(self)
        if problems:
            raise InvalidConfigError(*problems)
        self._derive_generation_batch()

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, which leaves out `hub_token`; here tokens in `model_init_kwargs` too."""
        values = super().to_dict()
        values["model_init_kwargs"] = without_tokens(values["model_init_kwargs"], known_tokens(self.hub_token))
        return values

    def __str__(self) -> str:
        return redacted(super().__str__(), known_tokens(self.hub_token))

    __repr__ = __str__

    def _derive_generation_batch(self) -> None:
        """Fill whichever of `generation_batch_size` and `steps_per_generation` is unset, as TRL does."""
        step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None:
            self.steps_per_generation = self.generation_batch_size // step
        else:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = step * self.steps_per_generation

    def sampling_options(self) -> dict[str, Any]:
        """What completions are sampled with: the fields, overridden by `generation_kwargs`.

        The fields themselves stay as they are, as in TRL: the loss uses `temperature` and `max_completion_length`,
        whatever `generation_kwargs` says about sampling.
        """
        options = {key: getattr(self, name) if name else None for key, name in GENERATION_KEYS.items()}
        return options | (self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {})

    @classmethod
    def from_trl(cls, trl_config: TRLGRPOConfig) -> GRPOConfig:
        """Convert an instance of TRL's `GRPOConfig`, or of a subclass, and refuse what would be lost.

        Shared fields keep the values that they have in `trl_config`, `logging_nan_inf_filter` excepted: in TRL's config
        nobody can tell a wish from the default that hides a NaN loss. A field that does not exist here is refused
        unless it has TRL's default (a subclass's own default for the fields that it adds). So are those that only tune
        a feature which is off, such as `vllm_mode` without `use_vllm`: someone set them to have an effect. Accepted
        with any value, because none can change what is computed or logged here: `pad_to_multiple_of`,
        `ds3_gather_for_generation` and `log_multimodal`.

        Raises:
            TypeError: `trl_config` is not TRL's config.
            InvalidConfigError: a `ValueError` with one line per field that is not supported or breaks a rule.
        """
        if not isinstance(trl_config, TRLGRPOConfig):
            raise TypeError(
                f"GRPOConfig.from_trl takes an instance of trl.GRPOConfig, not {type(trl_config).__name__}. Pass trl's "
                "config, or build a trl_grpo_ext.GRPOConfig directly."
            )
        shared, problems = cls._split_trl_fields(trl_config)
        # Both are filled after TRL's __post_init__, and each follows from the other.
        sizes = {"generation_batch_size": shared.pop("generation_batch_size")}
        shared["logging_nan_inf_filter"] = cls.logging_nan_inf_filter
        try:
            config = cls(**shared)
        except InvalidConfigError as error:
            raise InvalidConfigError(*problems, *error.problems) from None
        # A field that was changed after TRL's config was made may contradict what TRL had derived from it.
        problems += [
            f"{name}={value!r} must be {getattr(config, name)!r}, as follows from the other fields. Set it when the "
            "config is made, not afterwards."
            for name, value in (shared | sizes).items()
            if getattr(config, name) != value
        ]
        if problems:
            raise InvalidConfigError(*problems)
        return config

    @classmethod
    def _split_trl_fields(cls, trl_config: TRLGRPOConfig) -> tuple[dict[str, Any], list[str]]:
        """The values that carry over, and one problem for each field that cannot."""
        ours = {f.name for f in fields(cls) if f.init}
        # A subclass may give TRL's fields other defaults; it is TRL's that mean "off".
        defaults = {f.name: _default(f) for f in (*fields(trl_config), *fields(TRLGRPOConfig))}
        shared, problems = {}, []
        for name, default in defaults.items():
            value = getattr(trl_config, name)
            if name in ours:
                shared[name] = value
            elif value != default and name not in _NO_EFFECT:
                problems.append(
                    f"{name}={value!r} is not supported by trl_grpo_ext and must keep its default, {default!r}. Remove "
                    "it, or train with trl.GRPOTrainer."
                )
        return shared, problems


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _cuda_computes_bf16() -> bool:
    # Older cards emulate bf16, several times slower than fp32: that is no reason to choose it.
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
