"""Training that starts from an adapter on disk or on the Hub (`adapter_name_or_path`)."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..adapter_source import first_line


def check_adapter_source(adapter: str | None, model: object, peft_config: PeftConfig | None) -> None:
    """Refuse a run without a model, or with more than one adapter.

    Raises:
        ValueError: says which arguments exclude each other.
    """
    if adapter is None:
        if model is None:
            raise ValueError("model=None needs adapter_name_or_path, whose base is then trained. Pass a model.")
        return
    for name, clashes in (("peft_config", peft_config is not None), ("a PeftModel", isinstance(model, PeftModel))):
        if clashes:
            raise ValueError(
                f"adapter_name_or_path={adapter!r} and {name} are two adapters for one model. Leave out one of them: "
                "the adapter is loaded with its own config and goes on being trained."
            )


def adapter_config(adapter: str, revision: str | None, token: Any = None) -> PeftConfig:
    """The config that an adapter was saved with.

    Raises:
        ValueError: there is none, or none that this version of PEFT can read.
    """
    try:
        return PeftConfig.from_pretrained(adapter, revision=revision, token=token)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapter_name_or_path={adapter!r} has no adapter that can be read ({error}). Pass the folder that "
            "save_model wrote, or the id of a repository on the Hub."
        ) from error


def adapter_base(adapter: str, revision: str | None, token: Any = None) -> tuple[str, str | None]:
    """Id or path of the base that an adapter was trained on, and its revision.

    Raises:
        ValueError: the adapter does not say, or there is none.
    """
    config = adapter_config(adapter, revision, token)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"adapter_name_or_path={adapter!r} does not name its base model, so model=None leaves nothing to load. "
            "Pass the base as model."
        )
    return config.base_model_name_or_path, config.revision


def load_adapter(
    model: PreTrainedModel | PeftModel, adapter: str, revision: str | None, token: Any = None
) -> PeftModel:
    """`model` with the adapter on it, trainable, its weights in float32.

    Raises:
        ValueError: it was trained on a model of another size, or with other layers.
    """
    try:
        return PeftModel.from_pretrained(
            cast(PreTrainedModel, model), adapter, revision=revision, token=token, is_trainable=True
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"adapter_name_or_path={adapter!r} does not fit {type(model).__name__}: {first_line(error)} Pass the model "
            "that it was trained on, or none to use that."
        ) from error


def tokenizer_source(adapter: str | None, revision: str | None, token: Any = None) -> tuple[str, str | None] | None:
    """Where the adapter's own tokenizer is, as id or path and revision; None if it uses its base's."""
    if adapter is None:
        return None
    found = cached_file(
        adapter, "tokenizer_config.json", revision=revision, token=token, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else (adapter, revision)
