"""The part of the trainer that uploads: one commit per push, of files on the list in `release.py` and no others."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from .accounting.journal import FILE, FOLDER
from .model_card import CARD_NAME
from .release import released_copy
from .statement import STATEMENT_FILE
from .stating import StatingTrainer


logger = logging.getLogger(__name__)


class PublishingTrainer(StatingTrainer):
    """A `Trainer` whose pushes hold the weights, what is needed to use them, and what is said about them.

    Guarantee: only files on the list in `release.py` are uploaded. They are copied aside first and go in one commit,
    so that weights never stand on the Hub without their statement, nor with that of another step.
    """

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the model, its card and its privacy statement; arguments and result as in `Trainer`.

        Other files in `output_dir` stay: what `Trainer` leaves there without a word, unexpected ones are named in a
        warning.

        Args:
            commit_message: public, like everything in the commit.
            blocking: False to return a future at once.
            token: instead of `hub_token`.
            revision: branch to commit to, by default `hub_revision`.
            private: whether a repository that has to be made is private, by default `hub_private_repo`.
            kwargs: of `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        job = self._upload(self.args.output_dir, commit_message, token, revision)
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model of a checkpoint while training goes on, with a card of this step.

        A push that is still going on lets later ones fall out, as in `Trainer`, but never that of the last step.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self._finish_current_push()
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        message = f"Training in progress, step {self.state.global_step}"
        job = self._upload(checkpoint_folder, message, self.args.hub_token, self.args.hub_revision)
        job.add_done_callback(_tell_of_failure)
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _upload(self, folder: str, message: str | None, token: str | None, revision: str | None) -> Future[CommitInfo]:
        """Copy aside what may leave of `folder`, with the card and the ledger of `output_dir`, and upload the copy."""
        output, staging = Path(self.args.output_dir), TemporaryDirectory(prefix="_push-", dir=self.args.output_dir)
        target = Path(staging.name)
        released_copy(Path(folder), target)
        shutil.copyfile(output / CARD_NAME, target / CARD_NAME)
        ledger = Path(FOLDER, FILE)
        (target / ledger).unlink(missing_ok=True)
        if json.loads((target / STATEMENT_FILE).read_text(encoding="utf-8"))["ledger"] is not None:
            (target / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(output / ledger, target / ledger)
        return hf_api().run_as_future(_commit, staging, self.hub_model_id, message or "Upload", token, revision)


def _commit(
    staging: TemporaryDirectory, repo_id: str, message: str, token: str | None, revision: str | None
) -> CommitInfo:
    with staging as folder:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
        return hf_api().create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def _tell_of_failure(job: Future[CommitInfo]) -> None:
    """Say that a push in the background failed; `Trainer` would not."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning("An upload to the Hub failed; training goes on. %s", job.exception())
