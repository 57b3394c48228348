"""The part of the trainer that saves for, and pushes to, the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy, SaveStrategy
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import get_config_model_id

from ..config import GRPOConfig
from ..credentials import check_no_tokens, known_tokens, without_tokens
from ..watching import fingerprint_at_start
from .background import LONGEST_WAIT, BackgroundUploads
from .card import model_card
from .curves import save_reward_curves
from .datasets import dataset_id, describe_dataset
from .evaluation import BestLoaded, HeldOut, latest_results
from .push import UploadError, create_repository, push_adapter, push_command, reason, upload
from .run_config import run_config, save_run_config
from .staging import existing, stage, staging_folder, take, weight_files
from .tokenizer import TOKENIZER_FILES, differs_from_base


class HubPublishing(_BaseTrainer):
    """`push_to_hub`, `create_model_card`, and the uploads that `push_to_hub=True` asks for.

    What a user calls raises if it fails. What happens by itself (the repository made at the start, checkpoints by
    `hub_strategy`, the push after `save_model`) runs beside training, is retried, and ends in a warning at worst.
    """

    args: GRPOConfig
    hub_model_id: str | None  # type: ignore[assignment]  # transformers sets it to None first
    run_recipe: Mapping[str, Any] | None = None  # options of the command that the run was made by, for its record
    best_loaded: BestLoaded | None = None  # instead of the weights of the last step
    _uploads: BackgroundUploads | None = None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.best_loaded = BestLoaded(int(self.state.best_global_step or 0), len(self.state.log_history))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, beside whatever comes next: no network, or a wrong token, is a warning.

        `hub_model_id` has the owner's name in front only once the Hub has answered.
        """
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        asked = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token or self.args.hub_token)
        uploads = self._background(token)

        def create() -> None:
            try:
                self.hub_model_id = create_repository(api, str(self.hub_model_id), asked)
            except Exception as error:
                raise UploadError(f"The repository {self.hub_model_id} could not be made: {reason(error)}.") from error

        uploads.submit(create)

    def push_to_hub(  # type: ignore[override]  # a Future where not blocking, as transformers' documentation says
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model to `output_dir` and upload it; what is uploaded is said in `push_adapter`.

        Args:
            commit_message: Title of the commit.
            blocking: Whether to wait. Otherwise a `Future` is returned.
            token: By default `hub_token`, or that of `hf auth login`.
            revision: Branch; by default `hub_revision`, or `main`. It is made if it does not exist.
            private: Of a repository that does not exist yet; by default `hub_private_repo`.
            create_pr: Open a pull request instead of committing.
            **kwargs: For `create_model_card`.

        Returns:
            The commit; nothing on other processes than the first.

        Raises:
            UploadError: once everything is on disk. The message has the command that pushes it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder = Path(str(self.args.output_dir))
        repo_id = str(self.hub_model_id or self.args.hub_model_id or folder.absolute().name)
        self.create_model_card(**kwargs)

        def push() -> CommitInfo:
            return push_adapter(
                folder,
                repo_id,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo if private is None else private,
                revision=None if create_pr else revision or self.args.hub_revision,
                create_pr=create_pr,
                commit_message=commit_message or "End of training",
                with_tokenizer=self._own_tokenizer,
            )

        return push() if blocking else self._background(token).submit(push)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; with `push_to_hub=True` also push it, which ends in a warning if it fails."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except UploadError as error:
                self._background().warn(str(error).split(" Everything is in ")[0])

    def create_model_card(  # type: ignore[override]  # as TRL has it
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the model card into `output_dir`, and beside it `training_config.yaml` and `reward_curves.svg`."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        maker = self._maker  # type: ignore[attr-defined]  # of GRPOTrainer
        held_out = self._held_out()
        record = run_config(
            self.args,
            cast(PreTrainedModel, base),
            peft_config=model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None,
            rewards=dict(zip(maker.reward_scorer.names, maker.reward_weights.tolist(), strict=True)),
            train_dataset=self.train_dataset,
            eval_datasets={name: data for name, (data, _) in held_out.items()},
            base_fingerprint=fingerprint_at_start(self.state),
            recipe=self.run_recipe,
        )
        save_run_config(record, folder)
        curves = save_reward_curves(self.state.log_history, folder)
        name = str(self.hub_model_id or self.args.hub_model_id or folder.absolute().name)
        card = model_card(
            record,
            repo_id=name if "/" in name else None,  # whose it is, is filled in by the upload
            model_name=model_name or name.split("/")[-1],
            results=latest_results(
                self.state.log_history,
                [about for _, about in held_out.values()],
                None if self.is_in_train else self.best_loaded,  # of an earlier training, then
            ),
            has_curves=curves is not None,
            tokenizer_included=self._own_tokenizer,
            datasets=[dataset_name] if dataset_name else [],
            tags=[tags] if isinstance(tags, str) else tags or [],
            tokens=list(known_tokens(self.args.hub_token)),
        )
        card.save(folder / "README.md")

    def _held_out(self) -> dict[str, tuple[Dataset | IterableDataset, HeldOut]]:
        data = self.eval_dataset
        named = data if isinstance(data, dict) else {} if data is None else {"eval": data}
        completions = self.args.num_generations_eval or self.args.num_generations
        return {
            name: (
                dataset,
                HeldOut(
                    prefix=f"eval_{name}" if isinstance(data, dict) else "eval",
                    name=dataset_id(dataset) or name,
                    id=dataset_id(dataset),
                    config=name if isinstance(data, dict) else describe_dataset(dataset).get("config"),
                    split=describe_dataset(dataset).get("split"),
                    prompts=len(dataset) if isinstance(dataset, Dataset) else None,
                    completions_per_prompt=completions,
                ),
            )
            for name, dataset in named.items()
        }

    @cached_property
    def _own_tokenizer(self) -> bool:
        """Whether the tokenizer belongs to what is pushed: of an adapter only if it is not the base's."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return True
        base = get_config_model_id(cast(PreTrainedModel, model.get_base_model()).config)
        kwargs = self.args.model_init_kwargs
        revision = kwargs.get("revision") if isinstance(kwargs, dict) else None
        return differs_from_base(cast(PreTrainedTokenizerBase, self.processing_class), base, revision, only_local=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with _tokens_hidden(self.args):  # training_args.bin is a pickle of the config
            super()._save(output_dir, state_dict)

    # --- beside training ---

    def _background(self, token: str | None = None) -> BackgroundUploads:
        if self._uploads is None:
            folder, options = str(self.args.output_dir), (self.args.hub_private_repo, self.args.hub_revision)
            repo_id = self.args.hub_model_id or Path(folder).absolute().name
            self._uploads = BackgroundUploads(push_command(folder, repo_id, *options), token or self.args.hub_token)
        return self._uploads

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint beside training, by `hub_strategy`.

        From links to its files, because training goes on to delete old checkpoints and to write new ones.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        uploads = self._background()
        if not self.args.hub_always_push and not uploads.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, checkpoint = Path(str(self.args.output_dir)), Path(checkpoint_folder)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        place = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {place}"
        try:
            # For `trl-grpo push`, if this fails; as new files, since the old ones may be on their way
            for file in (*weight_files(checkpoint), *existing(checkpoint, TOKENIZER_FILES)):
                (folder / file).unlink(missing_ok=True)
                take(checkpoint, [file], folder)
            staged = stage(
                folder,
                str(self.hub_model_id),
                token=self.args.hub_token,
                with_tokenizer=self._own_tokenizer,
                weights=checkpoint,
            )
            self._upload_later(staged, message)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                latest = self.args.hub_strategy == HubStrategy.CHECKPOINT
                target = "last-checkpoint" if latest else checkpoint.name
                self._upload_later(self._whole(checkpoint), f"{message}, checkpoint", path_in_repo=target)
        except Exception as error:  # a full disk, a token in a file: whatever it is, no reason to stop training
            uploads.warn(f"The checkpoint of {place} was not uploaded: {error}.")

    def _whole(self, checkpoint: Path) -> Path:
        """All of a checkpoint, as links in a folder of its own."""
        staged = staging_folder(checkpoint.parent)
        # PEFT's README names the base even if it is a folder, for which the Hub refuses the whole upload
        files = [file for file in existing(checkpoint, ["*"]) if file.name != "README.md"]
        take(checkpoint, files, staged, link=True)
        small = [staged / file for file in files if (staged / file).stat().st_size < 2**24]  # not the optimizer's state
        try:
            check_no_tokens(small, known_tokens(self.args.hub_token))
        except ValueError:
            shutil.rmtree(staged)
            raise
        return staged

    def _upload_later(self, staged: Path, message: str, path_in_repo: str | None = None) -> None:
        def push() -> None:
            try:
                upload(
                    staged,
                    str(self.hub_model_id),
                    token=self.args.hub_token,
                    private=self.args.hub_private_repo,
                    revision=self.args.hub_revision,
                    commit_message=message,
                    path_in_repo=path_in_repo,
                )
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        job = self._background().submit(push)
        job.add_done_callback(lambda job: shutil.rmtree(staged, ignore_errors=True) if job.cancelled() else None)

    def _finish_current_push(self) -> None:
        if self._uploads is not None:
            self._uploads.finish(LONGEST_WAIT)


@contextmanager
def _tokens_hidden(args: GRPOConfig) -> Iterator[None]:
    """The config without its tokens, for as long as it is being written."""
    hidden = {
        "hub_token": None,
        "model_init_kwargs": without_tokens(args.model_init_kwargs, known_tokens(args.hub_token)),
    }
    kept = {name: getattr(args, name) for name in hidden}
    try:
        for name, value in hidden.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
