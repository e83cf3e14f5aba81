"""Fine-tune a small BEiT privately on handwritten digits, evaluate it, save it, check its claim: read top to bottom.

    python recipes/quickstart.py                      # about a minute on two idle cores, offline
    python recipes/quickstart.py --max_steps 10       # any argument of DPTrainingArguments

The same in a configurable form, for any data and model, is `finetune_image_classification.py`, whose default runs
these settings and has the measured accuracies in `digits_beit.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import HfArgumentParser

from hf_dpvision import DPTrainer, DPTrainingArguments, load_model
from hf_dpvision.data import ImageTransform, find_columns, image_examples, load_digits, model_input
from hf_dpvision.metrics import compute_metrics_for
from hf_dpvision.model_card import write_model_card
from hf_dpvision.trainable import TrainLayers, train_only, zero_head
from hf_dpvision.verify import verify_folder


HERE = Path(__file__).parent
SETTINGS = {
    "output_dir": "outputs/quickstart",
    "target_epsilon": 2.0,  # the budget: noise is calibrated so that epsilon ends at most here
    "target_delta": 1e-5,  # below one over the number of training images
    "logical_batch_size": 512,  # how many images take part in a step on average
    "max_steps": 50,
    "per_device_train_batch_size": 128,  # what fits into memory at once; changes neither privacy nor result
    "learning_rate": 0.6,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "eval_data": "public",  # may everyone see the held-out scans? only then do accuracies enter the card
    "save_strategy": "no",
    "logging_steps": 10,
}


def main(command_line: list[str]) -> dict[str, float]:
    """Run the example and return the accuracies before and after, and the upper bound of epsilon."""
    # The data: any datasets.DatasetDict with a column of images and one of labels.
    images = load_digits()
    columns = find_columns(images["train"].features)

    # The model: a folder, a Hub id such as "microsoft/beit-base-patch16-224", "timm/<name>", or a module of yours.
    name = str(HERE / "digits_beit")
    model = load_model(name, num_labels=10)
    train_only(model, TrainLayers.BIAS)  # few parameters leave little for the noise to hide in so few images
    zero_head(model)

    # Images are decoded and resized when they are used, as the model wants them.
    transform = ImageTransform(model_input(model, name).preprocessing)
    train, test = (image_examples(images[part], columns, transform, part) for part in ("train", "test"))

    given = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    (args,) = HfArgumentParser(DPTrainingArguments).parse_args_into_dataclasses([*given, *command_line])
    trainer = DPTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=compute_metrics_for(10))
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()  # checks the model, says what will be claimed, then trains and shows epsilon
    after = trainer.evaluate()["eval_accuracy"]
    bound = trainer.epsilon()

    # What can be released: weights, their card, and privacy.json, from which anyone can compute epsilon again.
    trainer.save_model()
    write_model_card(args.output_dir, trainer.privacy_statement(), model_name="quickstart", base_model="digits_beit")
    verification = verify_folder(Path(args.output_dir))
    print(f"\naccuracy {before:.1%} before, {after:.1%} after, epsilon <= {bound.upper:.3f}, {args.target_delta=}")
    print(f"the claim is {'verified' if not verification.findings else 'NOT verified'}: {args.output_dir}")
    return {"before": before, "after": after, "epsilon": bound.upper}


if __name__ == "__main__":
    main(sys.argv[1:])
