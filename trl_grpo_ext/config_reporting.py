"""Where a run is reported to: trackers that are there, and a repository whose name the Hub would take."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import GRPOConfig

# Trackers that are not looked for: transformers' list of those installed leaves them out for reasons of its own
_NOT_LOOKED_FOR = ("azure_ml", "flyte")
_PACKAGES = {"comet_ml": "comet-ml"}  # where it is not called as the tracker is


def reporting_problems(config: GRPOConfig) -> Iterator[str]:
    """Of `report_to` and `hub_model_id`, which transformers finds only when the weights are loaded, or trained."""
    yield from _trackers(config)
    yield from _repository(config)


def _trackers(config: GRPOConfig) -> Iterator[str]:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if not config.report_to:
        return
    installed = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(name), [*INTEGRATION_TO_CALLBACK, "none", "all"], n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else "Set 'none' for no tracker."
            yield f"report_to={name!r} must be one of {', '.join(INTEGRATION_TO_CALLBACK)}, none or all. {remedy}"
        elif name not in (*installed, *_NOT_LOOKED_FOR):
            yield (
                f"report_to={name!r} must be a tracker that is installed. Run `pip install "
                f"{_PACKAGES.get(name, name)}`, or set 'none'."
            )


def _repository(config: GRPOConfig) -> Iterator[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its stubs

    if config.hub_model_id is None and not config.push_to_hub:
        return
    name = config.hub_model_id or Path(str(config.output_dir)).absolute().name
    field = f"hub_model_id={name!r}" + ("" if config.hub_model_id else " (the name of output_dir)")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        yield f"{field} must be a name that the Hub takes, NAME or OWNER/NAME: {str(error).rstrip('.')}. Set another."
