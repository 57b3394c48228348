"""Which dataset a run was given, as far as `datasets` knows it."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset, IterableDataset

# As `datasets` keeps it of what it downloaded: hf://datasets/openai/gsm8k@<commit>/main/train-00000-of-00001.parquet
_SOURCE = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<revision>[^/]+)/")


def describe_dataset(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """`id` and `revision` on the Hub, `config`, `split`, `rows` and `fingerprint`; what is unknown is left out.

    The fingerprint is that of `datasets`: it changes with the source and with every `map` or `filter`.
    """
    found = {
        **_source(dataset),
        "config": dataset.info.config_name if _source(dataset) else None,
        "split": str(dataset.split) if dataset.split is not None else None,
        "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        "columns": dataset.column_names,
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def dataset_id(dataset: Dataset | IterableDataset | None) -> str | None:
    """The dataset's id on the Hub; None if it did not come from there."""
    return None if dataset is None else _source(dataset).get("id")


def _source(dataset: Dataset | IterableDataset) -> dict[str, str]:
    for url in dataset.info.download_checksums or {}:
        match = _SOURCE.match(url)
        if match:
            return match.groupdict()
    return {}
