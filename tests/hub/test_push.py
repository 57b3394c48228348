"""Pushing a folder to a local Hub with the real client: what is uploaded, to where, and what failures come to."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN, TOKEN, HubServer
from huggingface_hub import ModelCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.adapter_source import load_tokenizer, read_adapter
from trl_grpo_ext.cli.main import main
from trl_grpo_ext.hub import UploadError, push_adapter, push_command
from trl_grpo_ext.hub.staging import stage

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def pull(folder: Path, repo_id: str = "ada/run", **options: str) -> Path:
    return Path(snapshot_download(repo_id, cache_dir=folder, **options))


def test_what_is_pushed_is_what_is_pulled(hub: HubServer, adapter_folder: Path, tmp_path: Path) -> None:
    commit = push_adapter(adapter_folder, "run")
    assert commit.commit_url == f"{hub.url}/ada/run/commit/{commit.oid}"
    files = hub.files("ada/run")
    # The base is not known, so the tokenizer counts as changed; nothing else of the folder belongs there
    assert set(files) == ADAPTER | TOKENIZER
    weights = (adapter_folder / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    pulled = pull(tmp_path / "cache")
    assert (pulled / "adapter_model.safetensors").read_bytes() == weights
    assert not list(adapter_folder.glob(".hub-upload-*"))


def test_pulled_adapter_is_the_same_model(
    hub: HubServer, adapter_folder: Path, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    state = load_file(adapter_folder / "adapter_model.safetensors")
    push_adapter(adapter_folder, "ada/run")
    loaded = PeftModel.from_pretrained(make_model(), pull(tmp_path / "cache"))
    found = {name: value for name, value in loaded.state_dict().items() if "lora_A" in name}
    assert len(found) == 14  # 2 layers of 7 linear maps
    for name, value in found.items():
        assert torch.equal(value, state[name.replace(".default.weight", ".weight")])


def test_a_large_file_goes_in_parts(adapter_folder: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.part_size = 3000
    push_adapter(adapter_folder, "ada/run")
    size = (adapter_folder / "adapter_model.safetensors").stat().st_size
    assert hub.count(r"^PUT /lfs/\w+/\d+$") == -(-size // 3000) > 2
    weights = (adapter_folder / "adapter_model.safetensors").read_bytes()
    assert (pull(tmp_path / "cache") / "adapter_model.safetensors").read_bytes() == weights


def test_pushing_again_adds_no_commit(hub: HubServer, adapter_folder: Path) -> None:
    first = push_adapter(adapter_folder, "ada/run")
    again = push_adapter(adapter_folder, "ada/run")
    assert again.oid == first.oid
    assert hub.count("PUT /lfs/") == 1


def test_the_upload_pipeline_of_xet(
    hub: HubServer, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With hf_xet, as by default, folders take another way through the client; here every file is a small one."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.lfs_suffixes = ()
    hub.fail("POST /api/models/ada/run/commit/main", 503)
    push_adapter(adapter_folder, "ada/run")
    assert set(hub.files("ada/run")) == ADAPTER | TOKENIZER
    info = push_adapter(adapter_folder, "ada/other", create_pr=True)
    assert info.pr_num == 1
    assert set(hub.files("ada/other", "refs/pr/1")) == ADAPTER | TOKENIZER
    assert hub.files("ada/other") == {}


def test_private(hub: HubServer, adapter_folder: Path, tmp_path: Path) -> None:
    push_adapter(adapter_folder, "ada/run", private=True)
    assert hub.repos["ada/run"].private
    assert (pull(tmp_path / "own") / "adapter_config.json").is_file()
    for token in (READ_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("ada/run", "adapter_config.json", token=token, cache_dir=tmp_path / "others")


def test_branch_is_made(hub: HubServer, adapter_folder: Path, tmp_path: Path) -> None:
    push_adapter(adapter_folder, "ada/run", revision="lr-1e-6")
    assert set(hub.files("ada/run", "lr-1e-6")) == ADAPTER | TOKENIZER
    assert hub.files("ada/run") == {}
    push_adapter(adapter_folder, "ada/run", revision="lr-1e-6")  # it exists by now
    assert (pull(tmp_path / "cache", revision="lr-1e-6") / "adapter_config.json").is_file()


def test_pull_request(hub: HubServer, adapter_folder: Path, tmp_path: Path) -> None:
    info = push_adapter(adapter_folder, "ada/run", create_pr=True, commit_message="Better adapter")
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.repos["ada/run"].pull_requests == ["Better adapter"]
    assert hub.files("ada/run") == {}
    assert (pull(tmp_path / "cache", revision="refs/pr/1") / "adapter_config.json").is_file()


def test_pull_request_against_a_branch_is_refused(hub: HubServer, adapter_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"create_pr=True with revision='dev'.*Leave revision unset"):
        push_adapter(adapter_folder, "ada/run", create_pr=True, revision="dev")
    assert hub.requests == []


def test_503_twice_then_200(hub: HubServer, adapter_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail("POST /api/repos/create", 503, times=2)  # the client does not retry this one itself
    hub.fail("PUT /lfs/", 503, times=1)  # but this
    push_adapter(adapter_folder, "ada/run")
    assert set(hub.files("ada/run")) == ADAPTER | TOKENIZER
    assert hub.count("POST /api/repos/create") == 3
    assert hub.count("PUT /lfs/") == 2


def test_503_for_good(hub: HubServer, adapter_folder: Path) -> None:
    hub.fail("POST /api/repos/create", 503, times=99)
    with pytest.raises(UploadError) as raised:
        push_adapter(adapter_folder, "ada/run", private=True, revision="dev")
    assert str(raised.value) == (
        "The upload to ada/run failed: the Hub answers with 503 (status 503). Everything is in "
        f"{adapter_folder}; push it later with\n"
        f"    trl-grpo push {adapter_folder} --repo-id ada/run --private --revision dev"
    )
    assert hub.count("POST /api/repos/create") == 3
    assert not list(adapter_folder.glob(".hub-upload-*"))


def test_connection_cut_in_mid_upload(hub: HubServer, adapter_folder: Path, tmp_path: Path) -> None:
    hub.fail("PUT /lfs/", "cut")
    push_adapter(adapter_folder, "ada/run")
    assert hub.count("PUT /lfs/") == 2
    weights = (adapter_folder / "adapter_model.safetensors").read_bytes()
    assert weights[: len(weights) // 2] in hub.received  # what had gone through when it was cut
    assert (pull(tmp_path / "cache") / "adapter_model.safetensors").read_bytes() == weights


def test_connection_cut_in_mid_commit(hub: HubServer, adapter_folder: Path) -> None:
    """Without hf_xet the client does not retry a commit."""
    hub.fail("POST /api/models/ada/run/commit", "cut")
    push_adapter(adapter_folder, "ada/run")
    assert hub.count("POST /api/models/ada/run/commit") == 2
    assert hub.count("PUT /lfs/") == 1  # what is there already is not sent again


def test_wrong_token(hub: HubServer, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "hf_" + "Wrong" * 7
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(UploadError, match=r"does not know the token.*\(401\)\. Log in with `hf auth login`") as raised:
        push_adapter(adapter_folder, "ada/run")
    assert wrong not in str(raised.value)
    assert hub.count("POST /api/repos/create") == 1  # a wrong token stays wrong


def test_token_that_may_not_write(hub: HubServer, adapter_folder: Path) -> None:
    with pytest.raises(UploadError, match=r"the token may not write there \(403\)"):
        push_adapter(adapter_folder, "bob/run", token=READ_TOKEN)


def test_no_network(hub: HubServer, adapter_folder: Path) -> None:
    with pytest.raises(UploadError, match=r"no answer from the Hub \(ConnectError.*\n +trl-grpo push") as raised:
        push_adapter(adapter_folder, "ada/run", endpoint="http://127.0.0.1:9")
    assert "Traceback" not in str(raised.value)
    assert (adapter_folder / "adapter_model.safetensors").is_file()


def test_nothing_to_push(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapter to push: adapter_model\.safetensors and adapter_c"):
        push_adapter(tmp_path, "ada/run")


def test_a_file_that_holds_a_token_is_refused(hub: HubServer, adapter_folder: Path) -> None:
    card = ModelCard("---\ntags: [peft]\n---\n\nLoad it with token=" + TOKEN + "\n")
    card.save(adapter_folder / "README.md")
    with pytest.raises(ValueError, match=r"README\.md holds an access token") as raised:
        push_adapter(adapter_folder, "ada/run")
    assert TOKEN not in str(raised.value)
    assert hub.requests == []
    assert not list(adapter_folder.glob(".hub-upload-*"))


def test_a_card_that_the_hub_refuses(hub: HubServer, adapter_folder: Path) -> None:
    (adapter_folder / "README.md").write_text("---\nlicense: my-own\n---\n\nMine.\n")
    with pytest.raises(ValueError, match='"license" must be one of'):
        push_adapter(adapter_folder, "ada/run")


def test_tokenizer_of_the_base_is_left_out(adapter_folder: Path, base_folder: Path) -> None:
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base_folder)}))

    def staged(tokenizer: PreTrainedTokenizerBase) -> set[str]:
        tokenizer.save_pretrained(adapter_folder)
        folder = stage(adapter_folder, "ada/run")
        names = {path.name for path in folder.iterdir()}
        shutil.rmtree(folder)
        return names

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert staged(tokenizer) == ADAPTER
    tokenizer.pad_token = tokenizer.eos_token  # what fills rows up takes no part in text
    tokenizer.padding_side = "right"
    assert staged(tokenizer) == ADAPTER
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert staged(tokenizer) == ADAPTER | TOKENIZER | {"chat_template.jinja"}
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["<think>"])
    assert staged(tokenizer) == ADAPTER | TOKENIZER | {"chat_template.jinja"}  # the older template is there still


def test_base_model_can_be_named(hub: HubServer, adapter_folder: Path) -> None:
    push_adapter(adapter_folder, "ada/run", base_model="ada/tiny-base")
    files = hub.files("ada/run")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "ada/tiny-base"
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "ada/tiny-base"
    assert 'AutoPeftModelForCausalLM.from_pretrained("ada/run")' in card.text
    card.validate()


def test_command() -> None:
    assert push_command("a b", "ada/run", True, "dev", False, "x/y") == (
        "trl-grpo push 'a b' --repo-id ada/run --private --revision dev --base-model x/y"
    )
    assert push_command("out", "run", create_pr=True) == "trl-grpo push out --repo-id run --create-pr"


def test_the_command_does_what_it_says(
    hub: HubServer, adapter_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(adapter_folder), "--repo-id", "ada/run", "--private", "--revision", "dev"]) == 0
    assert set(hub.files("ada/run", "dev")) == ADAPTER | TOKENIZER
    assert hub.repos["ada/run"].private
    assert f"{hub.url}/ada/run/commit/" in capsys.readouterr().out


def test_the_command_fails_in_one_line(
    hub: HubServer, adapter_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST /api/repos/create", 403, times=9)
    caplog.set_level(logging.DEBUG)
    assert main(["push", str(adapter_folder), "--repo-id", "ada/run"]) == 1
    said = capsys.readouterr().err
    assert "the token may not write there (403)" in said
    assert "Traceback" not in said
    shutil.rmtree(adapter_folder)
    assert main(["push", str(adapter_folder), "--repo-id", "ada/run"]) == 2
    assert "has no adapter to push" in capsys.readouterr().err


def test_an_adapter_on_the_hub_brings_its_tokenizer(
    hub: HubServer, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `trl-grpo sample` and `merge` load it: with the chat template that was trained with."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    push_adapter(adapter_folder, "ada/run", token=TOKEN, with_tokenizer=True)
    source = read_adapter("ada/run", base="ada/base")
    assert load_tokenizer(source, source.base, None).name_or_path == "ada/run"
