"""Whether a tokenizer is still its base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def tokenizer_changed(folder: Path, base: str | None) -> bool:
    """Whether the tokenizer in `folder` writes or reads anything differently from that of `base`.

    A padding token that the base's lacks is no change: it takes no part in text. Where the base's tokenizer cannot be
    loaded, the one in the folder counts as changed; without one there, nothing has.
    """
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return False
    return differs_from_base(AutoTokenizer.from_pretrained(folder), base)


def differs_from_base(
    tokenizer: PreTrainedTokenizerBase, base: str | None, revision: str | None = None, only_local: bool = False
) -> bool:
    """The same of a tokenizer in memory. `only_local`: the base's is not asked for over the network."""
    if not base:
        return True
    try:
        original = AutoTokenizer.from_pretrained(base, revision=revision, local_files_only=only_local)
    except (OSError, ValueError):
        return True
    return _essence(tokenizer) != _essence(original)


def _essence(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that text goes through: vocabulary, merges, normalization, special tokens, chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"vocabulary": tokenizer.get_vocab(), "special": special, "template": tokenizer.chat_template}
    whole = json.loads(backend.to_str())
    # Set by whoever padded or cut a batch last
    pipeline = {name: part for name, part in whole.items() if name not in ("padding", "truncation")}
    return {"pipeline": pipeline, "special": special, "template": tokenizer.chat_template}
