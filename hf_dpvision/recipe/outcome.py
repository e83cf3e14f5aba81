"""What a run of the recipe found: its scores, its record, its card, and what is printed."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sized
from datetime import date
from pathlib import Path
from typing import cast

from ..config import ParsedArguments, without_folders
from ..data import ImageData
from ..model_card import CardResult, write_model_card
from ..report import RELEASED_FILES
from ..results import (
    SUMMARY,
    RecipeRecord,
    append_record,
    comparison_table,
    environment,
    update_results_table,
)
from ..trainer import DPTrainer
from ..training_args import DPTrainingArguments
from ..wording import unit_in_words
from .arguments import SECRET, DataTrainingArguments, data_name
from .preparing import Say


WRITING = ("--results_table", "--results_summary", "--results_record")
NOT_METRICS = {"epoch", "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
NOT_METRICS |= {"eval_model_preparation_time", "eval_metrics_are_private"}


def evaluated(trainer: DPTrainer, when: str, say: Say) -> dict[str, float] | None:
    """Return the metrics on the held-out part by name, or None if nothing is to be evaluated."""
    if not trainer.args.do_eval:
        return None
    say(f"\nEvaluating {when}:")
    values = trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in values.items() if name not in NOT_METRICS}


def make_record(
    parsed: ParsedArguments,
    typed: list[str],
    data: ImageData,
    trainer: DPTrainer,
    scores: dict[str, dict[str, float] | None],
    sizes: tuple[int, int],
    seconds: float,
) -> RecipeRecord:
    """Put together what `results.json` and the table of results say; folders of this machine are left out."""
    model_args, data_args, training_args = parsed.groups
    bounds = trainer.epsilon() if training_args.do_train and not training_args.disable_dp else None
    measured = {model: score for model, score in scores.items() if score}
    held_out = 0 if data.held_out is None else len(data.held_out)
    # a stream is counted while it is trained on
    trained_on = data.size
    if trained_on is None and training_args.do_train:
        trained_on = len(cast(Sized, trainer.train_dataset))
    hardware, versions = environment()
    column = training_args.privacy_unit_column if bounds else None
    return RecipeRecord(
        recipe=parsed.config.stem if parsed.config else Path(training_args.output_dir).name,
        command=shlex.join(map(without_folders, _of_run(typed))),
        settings=parsed.settings(leave_out=SECRET),
        model=Path(model_args.model_name_or_path).name,
        data=f"{data_name(data_args)}, {trained_on} train and {held_out} held-out images",
        trained=f"{model_args.train_layers}, {sizes[0]:,} of {sizes[1]:,} parameters",
        epsilon=bounds.upper if bounds else None,
        delta=training_args.target_delta if bounds else None,
        accountant=bounds.accountant if bounds else None,
        metric=next((name for score in measured.values() for name in score), data_args.metric),
        scores=measured,
        seconds=round(seconds, 1),
        hardware=hardware,
        versions=versions,
        date=date.today().isoformat(),
        unit=None if column is None else unit_in_words(column, training_args.examples_per_unit).short,
        mechanism=mechanism_of(trainer) if bounds else None,
    )


def mechanism_of(trainer: DPTrainer) -> dict[str, object]:
    """Return what epsilon was computed from: how examples were drawn, and the steps that were charged."""
    statement = trainer.privacy_statement()
    return {"sampling": statement["sampling"]["scheme"], "events": statement["events"]}


def _of_run(command_line: list[str]) -> list[str]:
    """Return the command line without the options that only say where the results are written."""
    writing = {i for i, word in enumerate(command_line) if word in WRITING}
    return [word for i, word in enumerate(command_line) if i not in writing and i - 1 not in writing]


def report(record: RecipeRecord, trainer: DPTrainer, parsed: ParsedArguments, data: ImageData, say: Say) -> None:
    """Write the card and the results, and print the table."""
    model_args, data_args, training_args = parsed.groups
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"results": folder / "results.json"}
    files["results"].write_text(record.to_json(), encoding="utf-8")
    if training_args.do_train:
        files["card"] = write_model_card(
            folder,
            trainer.privacy_statement(),
            model_name=training_args.hub_model_id or folder.name,
            base_model=model_args.model_name_or_path,
            datasets=[data_name(data_args)],
            results=card_results(record, data_args, training_args),
            training=record.settings,
            report=trainer.report_is_current,
        )
        files = {"model": folder, "privacy": folder / "privacy.json", **files}
        if trainer.report_is_current:
            files["report"] = folder / RELEASED_FILES[0]
    if data_args.results_table is not None:
        files["table"] = Path(data_args.results_table)
        update_results_table(files["table"], record)
    if data_args.results_summary is not None:
        files["summary"] = Path(data_args.results_summary)
        update_results_table(files["summary"], record, SUMMARY)
    if data_args.results_record is not None:
        files["record"] = Path(data_args.results_record)
        append_record(files["record"], dataclasses.asdict(record))
    say(f"\n{comparison_table(record)}\n")
    if data.held_out is not None:
        covered = "" if training_args.eval_data == "public" else " (held-out data, not covered by epsilon)"
        say(f"Measured on {len(data.held_out):,} images{covered} in a run of {record.seconds / 60:.1f} minutes.")
    for what, where in files.items():
        say(f"  {what:8} {where}")


def card_results(
    record: RecipeRecord, data_args: DataTrainingArguments, training_args: DPTrainingArguments
) -> list[CardResult]:
    """Return all measured values in the form the card wants them; none if not everyone may see the held-out part."""
    if training_args.eval_data != "public":
        return []
    released = "non_private" if training_args.disable_dp else "private"
    words = {"before": "before fine-tuning", "non_private": "same fine-tuning without privacy", released: "this model"}
    return [
        CardResult(
            words[model],
            metric,
            value,
            data_name(data_args),
            "held-out part",
            released=model == released,
            protected=model != "non_private",
        )
        for model, score in record.scores.items()
        for metric, value in score.items()
    ]
