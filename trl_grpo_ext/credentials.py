"""Keeps access tokens out of everything that is written, logged or uploaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

REMOVED = "<token removed>"
# User access tokens are hf_ and 34 letters and digits, OAuth's are longer: anything near that is taken for one
_LOOKS_LIKE_ONE = re.compile(r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.=-]*")
_SECRET_KEYS = frozenset({"token", "use_auth_token", "hub_token", "push_to_hub_token", "access_token", "password"})
_SECRET_ENDINGS = ("_api_key", "api_key", "_secret", "_password")
_SHORTEST = 8  # anything shorter is no token, and would blacken harmless text


def known_tokens(*given: Any) -> frozenset[str]:
    """The tokens given and those that `huggingface_hub` would use."""
    environment = (os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    candidates = [*given, *environment, get_token()]
    return frozenset(token for token in candidates if isinstance(token, str) and len(token) >= _SHORTEST)


def redacted(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` without the tokens, and without whatever looks like one."""
    for token in sorted(tokens, key=len, reverse=True):  # one may begin with another
        text = text.replace(token, REMOVED)
    return _LOOKS_LIKE_ONE.sub(REMOVED, text)


def without_tokens(value: Any, tokens: Iterable[str] = ()) -> Any:
    """A copy of nested dicts and lists without entries that are secrets by their name or hold a token.

    What is no dict, list, tuple or string is returned as it is.
    """
    tokens = frozenset(tokens)
    if isinstance(value, dict):
        return {
            key: without_tokens(item, tokens)
            for key, item in value.items()
            if not _is_secret(key) and redacted(str(key), tokens) == str(key) and not _is_token(item, tokens)
        }
    if isinstance(value, list | tuple):
        return [without_tokens(item, tokens) for item in value if not _is_token(item, tokens)]
    return redacted(value, tokens) if isinstance(value, str) else value


def _is_secret(key: Any) -> bool:
    return isinstance(key, str) and (key.lower() in _SECRET_KEYS or key.lower().endswith(_SECRET_ENDINGS))


def _is_token(value: Any, tokens: frozenset[str]) -> bool:
    return isinstance(value, str) and redacted(value, tokens) != value


def check_no_tokens(files: Iterable[Path], tokens: Iterable[str]) -> None:
    """Refuse to upload a file that holds one of `tokens`, or a text file with something that looks like one.

    Of weights in safetensors only the header is read: the rest is numbers.

    Raises:
        ValueError: names the file, not the token.
    """
    secrets = [token.encode() for token in tokens]
    for file in files:
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise ValueError(
                        f"{file.name} is not a safetensors file: it is cut off, or a pointer of git-lfs (git lfs pull "
                        "fetches what it points to)."
                    )
                data = stream.read(length)
            else:
                data = stream.read()
        text = "" if b"\0" in data else data.decode(errors="ignore")
        if any(secret in data for secret in secrets) or _LOOKS_LIKE_ONE.search(text):
            raise ValueError(
                f"{file.name} holds an access token of the Hub, and must not be uploaded. Remove the token from it, "
                "and revoke the token if others could have read the file."
            )
