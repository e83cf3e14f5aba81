"""The part of the trainer that uploads: one commit per push, of files on the list in `release.py` and no others."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, create_commit, run_as_future
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from .accounting.journal import FILE, FOLDER
from .model_card import CARD_NAME
from .release import is_terms_of_use, released_files, unexpected_files
from .report import RELEASED_FILES
from .statement import STATEMENT_FILE
from .stating import StatingTrainer


logger = logging.getLogger(__name__)


class PublishingTrainer(StatingTrainer):
    """A `Trainer` whose pushes hold the weights, what is needed to use them, and what is said about them.

    Guarantee: only files on the list in `release.py` are uploaded, and of weights only those of this model. They are
    put aside first and go in one commit, so that weights never stand on the Hub without their statement, nor with
    that of another step.
    """

    push_in_progress: Any  # Trainer declares None, and a PushInProgress with one upload and not several

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
            if private is not None:
                self.args.hub_private_repo = private  # what every version of init_hf_repo reads
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        staging = self._staging() if self.is_world_process_zero() else None
        # afresh: output_dir may hold weights of another run; by every process, since each may hold a part of them
        self.save_model(None if staging is None else staging.name, _internal_call=True)
        if staging is None:
            return None
        self.write_report()
        self.create_model_card(**kwargs)
        self._finish_current_push()
        self._name_what_stays()
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        job = self._upload(staging, commit_message, token, revision)
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model of a checkpoint while training goes on, with a card of this step.

        A push that is still going on lets later ones fall out, as in `Trainer`, but never that of the last step.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self._finish_current_push()
            self.write_report()  # of the last step; earlier ones have none
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        message = f"Training in progress, step {self.state.global_step}"
        staging = self._staging()
        for name in released_files(Path(checkpoint_folder)):
            _copy(name, checkpoint_folder, staging.name)
        job = self._upload(staging, message, self.args.hub_token, self.args.hub_revision)
        job.add_done_callback(_tell_of_failure)
        if not busy:
            self.push_in_progress = PushInProgress()
        self.push_in_progress.jobs.append(job)

    def _staging(self) -> TemporaryDirectory:
        """Make a folder for what is going to be uploaded, which training does not touch any more."""
        return TemporaryDirectory(prefix="_push-", dir=self.args.output_dir)

    def _upload(
        self, staging: TemporaryDirectory, message: str | None, token: str | None, revision: str | None
    ) -> Future[CommitInfo]:
        """Lay card, report, ledger and licence of `output_dir` beside the model, and upload in the background."""
        output = self.args.output_dir
        said = json.loads(Path(staging.name, STATEMENT_FILE).read_text(encoding="utf-8"))
        ledger = [] if said["ledger"] is None else [f"{FOLDER}/{FILE}"]
        terms = [path.name for path in Path(output).glob("[LN]*") if path.is_file() and is_terms_of_use(path.name)]
        report = RELEASED_FILES if self.report_is_current else ()
        for name in (CARD_NAME, *ledger, *terms, *report):
            _copy(name, output, staging.name)
        return run_as_future(_commit, staging, self.hub_model_id, message or "Upload", token, revision)

    def _name_what_stays(self) -> None:
        """Name unexpected files: a push after a week must not fail because of notes, and must not take them along."""
        unexpected = unexpected_files(Path(self.args.output_dir))
        if unexpected:
            logger.warning(
                "Not uploaded, because nothing says that they are free of private data: %s%s. If they are, upload "
                "them yourself.",
                ", ".join(unexpected[:10]),
                f" and {len(unexpected) - 10} more" if len(unexpected) > 10 else "",
            )


def _copy(name: str, source: str, target: str) -> None:
    Path(target, name).parent.mkdir(exist_ok=True)
    shutil.copyfile(Path(source, name), Path(target, name))


def _commit(
    staging: TemporaryDirectory, repo_id: str, message: str, token: str | None, revision: str | None
) -> CommitInfo:
    with staging as folder:
        operations = [CommitOperationAdd(name, Path(folder, name)) for name in released_files(Path(folder))]
        return create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def _tell_of_failure(job: Future[CommitInfo]) -> None:
    """Say that a push in the background failed; `Trainer` would not."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning("An upload to the Hub failed; training goes on. %s", job.exception())
