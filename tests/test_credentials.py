"""Tokens are found in text, nested values and files; what only resembles one is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN, TOKEN
from safetensors.torch import save_file

from trl_grpo_ext.credentials import REMOVED, check_no_tokens, known_tokens, redacted, without_tokens

ODD = "a-token-of-a-private-hub"  # known, but of no form


def test_known_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert known_tokens(ODD, None, True, "short") == {TOKEN, ODD}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token={TOKEN}, twice {TOKEN}", f"token={REMOVED}, twice {REMOVED}"),
        (f"https://x:{ODD}@host", f"https://x:{REMOVED}@host"),
        ("hf_oauth_eyJhbGciOiJIUzI1NiJ9.e30.x-y_z", REMOVED),
        ("hf_reward and hf_my_reward_function_with_a_name", "hf_reward and hf_my_reward_function_with_a_name"),
        ("ada/hf_model", "ada/hf_model"),
    ],
)
def test_redacted(text: str, expected: str) -> None:
    assert redacted(text, [ODD]) == expected


def test_a_token_that_begins_another_leaves_nothing_of_it() -> None:
    assert redacted("abcdefgh-ijkl", ["abcdefgh", "abcdefgh-ijkl"]) == REMOVED


def test_without_tokens() -> None:
    value = {
        "token": "anything",
        "use_auth_token": True,
        "openai_api_key": "sk-1",
        "eos_token": "<eos>",
        "suppress_tokens": [1, 2],
        "revision": READ_TOKEN,
        "nested": {"list": ["a", TOKEN, {"password": 1, "b": 2}], "number": 3.5},
        f"key of {TOKEN}": 1,
        "dtype": torch.float32,
    }
    assert without_tokens(value) == {
        "eos_token": "<eos>",
        "suppress_tokens": [1, 2],
        "nested": {"list": ["a", {"b": 2}], "number": 3.5},
        "dtype": torch.float32,
    }
    assert "token" in value  # a copy was changed
    assert without_tokens(None) is None


def test_files(tmp_path: Path) -> None:
    clean, text, pickled, weights = (tmp_path / name for name in ("a.json", "b.json", "c.bin", "d.safetensors"))
    clean.write_text('{"eos_token": "<eos>"}')
    text.write_text(f'{{"token": "{TOKEN}"}}')
    pickled.write_bytes(b"\x80\x04\0" + ODD.encode())
    save_file({"x": torch.zeros(3)}, weights, metadata={"note": ODD})
    check_no_tokens([clean, pickled, weights], [])
    for file in (text, pickled, weights):
        with pytest.raises(ValueError, match=rf"{file.name} holds an access token") as raised:
            check_no_tokens([clean, file], [ODD])
        assert ODD not in str(raised.value)


def test_a_pointer_in_the_place_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a safetensors file.*git lfs pull"):
        check_no_tokens([file], [])
