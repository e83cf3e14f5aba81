"""`hf-dpvision train`: fine-tune a model with the recipe that the package carries."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from ..errors import ArgumentRefused
from .commands import Answer, add_command


_TRAIN_HELP = """\
Fine-tune an image classifier with differential privacy. Data and model are loaded and checked, the model is evaluated,
fine-tuned privately, evaluated again and saved with privacy.json, a model card, results.json and a report; a table
says what privacy cost. Arguments are those of the model, the data and DPTrainingArguments, from a YAML file, from the
command line, or from both, where the command line counts; --list-arguments prints all of them. Relative paths in a
file start at its folder. Exit code 143 if SIGTERM ended the run, of which there is a checkpoint then.

examples:
  hf-dpvision train --config run.yaml
  hf-dpvision train --config run.yaml --target_epsilon 2 --output_dir outputs/two --json
  hf-dpvision train --model_name_or_path timm/vit_small_patch16_224.augreg_in21k --train_dir pictures/train \\
      --validation_dir pictures/test --train_layers bias --target_epsilon 8 --target_delta 1e-5 \\
      --logical_batch_size 500 --num_train_epochs 10 --learning_rate 5e-3 --output_dir outputs/pictures
  hf-dpvision train --config run.yaml --resume_from_checkpoint true
  accelerate launch -m hf_dpvision.cli train --config run.yaml
  hf-dpvision train --list-arguments
"""


def register(commands: Any) -> None:
    """Add the command."""
    train = add_command(commands, "train", _TRAIN_HELP, _train)
    train.add_argument("--list-arguments", action="store_true", help="print all arguments of a run, and run nothing")
    train.set_defaults(hands_on=True, hands_on_behind=True)


def _train(arguments: argparse.Namespace) -> Answer:
    # Before torch starts its threads: waiting ones that spin made a step ten times slower on cores that were shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not arguments.rest and not arguments.list_arguments:
        raise ArgumentRefused(
            "Nothing says what to train. Give --config FILE.yaml, or the model, the data and the budget as arguments; "
            "hf-dpvision train --help has examples."
        )
    from .. import recipe
    from ..recipe.arguments import every_argument

    if arguments.list_arguments:
        described = every_argument()
        return Answer(described, "\n".join(f"--{name}\n    {text}" for name, text in described.items()))
    # with --json, what training prints is not the answer
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        record = recipe.finetune(arguments.rest, ["hf-dpvision", "train"])
    first = int(os.environ.get("RANK", "0")) == 0
    return Answer(json.loads(record.to_json()), "", silent=not (arguments.json and first))
