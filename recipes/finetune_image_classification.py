"""Fine-tune an image classifier with differential privacy, and compare with what privacy cost.

    python recipes/finetune_image_classification.py                       # the embedded default: digits_beit.yaml
    python recipes/finetune_image_classification.py --config recipes/cifar10_deit_tiny.yaml --target_epsilon 2
    accelerate launch recipes/finetune_image_classification.py \\
        --model_name_or_path timm/vit_small_patch16_224.augreg_in21k --dataset_name uoft-cs/cifar100 \\
        --target_epsilon 3 --target_delta 1e-5 --logical_batch_size 1000 --num_train_epochs 3 --learning_rate 1e-3 \\
        --output_dir outputs/cifar100

Steps: load and check the data; evaluate the model as it is; fine-tune it privately; save it with `privacy.json`, a
model card and `results.json`; if `compare_non_private`, fine-tune the same initial model once more without privacy
through the same data path (that model is not saved); print a table.

Results of the configurations beside this file stand in recipes/README.md, written by the runs themselves
(`--results_table`). In a YAML file, relative paths start at the folder of that file; on the command line, at the
working folder. The run, step by step, is hf_dpvision/recipe/finetuning.py; `hf-dpvision train` does the same wherever
the package is installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


# Before torch starts its threads: waiting threads that spin made a step ten times slower on cores that were shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


# Before timm is imported: on a processor, the backward pass of fused attention takes twice as long.
if not torch.cuda.is_available():
    os.environ.setdefault("TIMM_FUSED_ATTN", "0")

from hf_dpvision import DPTrainer, recipe
from hf_dpvision.errors import RefusedError
from hf_dpvision.results import RecipeRecord


DEFAULT_CONFIG = Path(__file__).with_name("digits_beit.yaml")


def main(command_line: list[str]) -> RecipeRecord:
    """Run the recipe; see the top of this file."""
    return recipe.finetune(command_line, ["python", f"recipes/{Path(__file__).name}"], DEFAULT_CONFIG)


def audited_trainer(folder: str, command_line: list[str]) -> DPTrainer:
    """Return the trainer that these arguments describe, by default the embedded ones, for `hf-dpvision audit`."""
    return recipe.audited_trainer(folder, command_line or ["--config", str(DEFAULT_CONFIG)])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefusedError as refusal:
        sys.exit(f"{type(refusal).__name__}: {refusal}")
