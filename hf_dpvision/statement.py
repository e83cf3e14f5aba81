"""The privacy statement of a run: what `privacy.json` holds beside every file of weights."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from . import __version__
from .accounting import Bounds, Ledger, Search, claim
from .accounting.journal import Mark
from .accounting.search import record_of
from .clipping import Clipping
from .rules.cost import NormRule
from .streaming import RowSource
from .trained import trained_parameters
from .training_args import DPTrainingArguments
from .wording import Unit, not_covered, unit_in_words


STATEMENT_FILE = "privacy.json"
SCHEMA_VERSION = "1.3"  # the fields are described in schemas/privacy-1.3.json
NEIGHBORS = "zero-out"

_SOFTWARE = ("torch", "transformers", "timm", "accelerate", "prv-accountant")
_UNPROTECTED = (
    "No differential privacy: epsilon is infinite. Gradients were neither clipped nor covered by noise, so the "
    "weights may contain the training images."
)
_REPEATABLE = (
    "No differential privacy: epsilon is infinite. Sampling and noise came from a fixed seed, for a test, and whoever "
    "knows it can subtract the noise."
)


@dataclass(frozen=True)
class RunRecord:
    """What the statement is made from; everything in it is public, and nothing depends on who was sampled.

    Attributes:
        args: of the trainer.
        ledger: the steps charged.
        bounds: epsilon of the ledger at `args.target_delta`.
        clipping: the style used.
        dataset_size: number of training examples, or units, 0 if no training has been set up.
        sample_rate: q, of the last call of `train()`.
        noise_multiplier: sigma, of the last call of `train()`; 0 without privacy.
        secret_randomness: False if draws and noise can be repeated.
        rng: name of the noise generator.
        base_model: what was fine-tuned, or None if it has no name.
        was_unprotected: whether the weights went through a `train()` without privacy, whatever `args` say now.
        mark: where the ledger on disk stood when the weights were as they are; None if there is none.
        rows: where those of a draw are read from, of the last call of `train()`.
        cryptographic: whether the noise generator is.
        search: over settings that the weights come from, if it is paid for; `bounds` are its own then.
    """

    args: DPTrainingArguments
    ledger: Ledger
    bounds: Bounds
    clipping: Clipping
    dataset_size: int
    sample_rate: float
    noise_multiplier: float
    secret_randomness: bool
    rng: str
    base_model: str | None
    was_unprotected: bool = False
    mark: Mark | None = None
    rows: RowSource = RowSource.INDEXED
    cryptographic: bool = False
    search: Search | None = None

    @property
    def without_privacy(self) -> bool:
        """Whether any step was, or would be, taken without clipping and noise."""
        return self.was_unprotected or self.args.disable_dp

    @property
    def private(self) -> bool:
        """Whether the ledger's epsilon may be claimed."""
        return self.secret_randomness and not self.without_privacy

    @property
    def unit(self) -> Unit:
        """The unit of privacy in words."""
        return unit_in_words(self.args.privacy_unit_column, self.args.examples_per_unit)

    def claim(self) -> str:
        """The claim in words, several lines."""
        if self.without_privacy:
            return _UNPROTECTED
        if not self.secret_randomness:
            return _REPEATABLE
        return claim(
            self.bounds,
            self.ledger,
            clip_norm=self.clipping.sensitivity(),
            dataset_size=self.dataset_size or None,
            privacy_unit=self.unit.what,
            noun=self.unit.noun,
            count=self.unit.count,
            search=self.search,
        )


def make_statement(run: RunRecord, model: nn.Module) -> dict[str, Any]:
    """Return the statement as plain values, ready for JSON; an infinite epsilon is the text "inf"."""
    args = run.args
    epsilon = run.bounds.upper if run.private else math.inf
    statement: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "applies_to": "fine-tuning",
        "base_model": run.base_model,
        "dataset": args.train_data_name,
        "mechanism": "none" if run.without_privacy else "dp-sgd",
        "definition": "approximate-dp",
        "guarantee": {"epsilon": _jsonable(epsilon), "delta": args.target_delta, "gdp": _gdp(run)},
        "accountant": _accountant(run.bounds),
        "unit_of_privacy": args.privacy_unit,
        "grouping": _grouping(args),
        "neighboring_relation": NEIGHBORS,
        "adversary": "all-intermediate-iterates-released",
        "sampling": {
            "scheme": "poisson",
            "rows": run.rows.value,
            "rate": run.sample_rate,
            "expected_batch_size": args.logical_batch_size,
            "dataset_size": run.dataset_size,
            "dataset_size_is_public": True,
        },
        "noise": {
            "multiplier": run.noise_multiplier,
            "std": run.noise_multiplier * run.clipping.sensitivity(),
            "rng": f"os-entropy-seeded-{run.rng}" if run.secret_randomness else f"fixed-seed-{run.rng}",
            "cryptographic": run.cryptographic,
            "floating_point_protection": "none",
        },
        "clipping": _clipping(run, model),
        "steps": run.ledger.steps,
        "events": [
            {"sample_rate": e.sample_rate, "noise_multiplier": e.noise_multiplier, "steps": e.steps}
            for e in run.ledger.events
        ],
        "ledger": None if run.mark is None or run.without_privacy else asdict(run.mark),
        "trainable_parameters": _trainable(model),
        "not_covered": not_covered(args.eval_data, run.unit, run.search),
        "hyperparameter_tuning": record_of(run.search),
        "evaluation": {"data": args.eval_data, "metrics_are_private": args.eval_data == "private"},
        "unsafe_flags": _unsafe_flags(run),
        "software": {"hf_dpvision": __version__} | {name: version(name) for name in _SOFTWARE},
        "claim": run.claim(),
    }
    return statement


def public_settings(args: DPTrainingArguments) -> dict[str, Any]:
    """Return the hyper-parameters to show on a card; none of them depends on private data."""
    names = ("learning_rate", "weight_decay", "max_steps", "num_train_epochs", "warmup_steps")
    chosen = {name: getattr(args, name) for name in names}
    precision = "bfloat16 autocast" if args.bf16 else "float32"
    kinds: dict[str, Any] = {
        "optimizer": OptimizerNames(args.optim).value,
        "learning rate schedule": SchedulerType(args.lr_scheduler_type).value,
    }
    if args.augmentation_multiplicity > 1:
        kinds["augmentation multiplicity"] = args.augmentation_multiplicity
    kinds |= args.optimisation_in_words()
    return kinds | {"precision": precision} | {name.replace("_", " "): value for name, value in chosen.items()}


def write_statement(folder: str | Path, statement: Mapping[str, Any]) -> Path:
    """Write `statement` as `privacy.json` into `folder`, made if it does not exist; return the path."""
    path = Path(folder) / STATEMENT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(statement, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _grouping(args: DPTrainingArguments) -> dict[str, Any] | None:
    if args.privacy_unit_column is None:
        return None
    return {"column": args.privacy_unit_column, "examples_per_unit": args.examples_per_unit}


def _gdp(run: RunRecord) -> dict[str, Any] | None:
    chosen = run.search is not None and run.search.stopping is not None  # the Rényi bound alone covers it
    bound = run.ledger.gdp(run.bounds) if run.private and not chosen else None
    return None if bound is None else asdict(bound)


def _accountant(bounds: Bounds) -> dict[str, Any]:
    return {
        "name": bounds.accountant,
        "package": bounds.package,
        "version": __version__ if bounds.package == "hf_dpvision" else version(bounds.package),
        "lower": _jsonable(bounds.lower),
        "estimate": _jsonable(bounds.estimate),
        "upper": _jsonable(bounds.upper),
        "eps_error": bounds.eps_error,
        "delta_error": bounds.delta_error,
        "notes": list(bounds.notes),
    }


def _clipping(run: RunRecord, model: nn.Module) -> dict[str, Any] | None:
    if run.without_privacy:
        return None
    stated = {
        "bound": run.args.per_sample_max_grad_norm,
        "sensitivity": run.clipping.sensitivity(),
        "norm": "l2",
        "granularity": run.args.clipping_granularity,
        "function": run.args.clipping_function,
        "norm_rule": NormRule(run.args.norm_rule).value,
        "backward_passes": run.args.backward_passes,
    }
    if not run.args.clips_groups:
        return stated
    sizes = {name: parameter.numel() for name, parameter in trained_parameters(model).items()}
    return stated | {"groups": run.clipping.over(sizes).bounds()}


def _trainable(model: nn.Module) -> dict[str, Any]:
    counts = {True: 0, False: 0}
    names: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, parameter in model.named_parameters():
        counts[parameter.requires_grad] += parameter.numel()
        names[parameter.requires_grad][_without_numbers(name)] += 1
    return {
        "scope": "subset" if counts[False] else "all",
        "trained": counts[True],
        "frozen": counts[False],
        "trained_tensors": dict(names[True]),
        "frozen_tensors": dict(names[False]),
    }


def _without_numbers(name: str) -> str:
    """Name the tensors of all blocks alike: `blocks.3.norm1.weight` becomes `blocks.*.norm1.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def _unsafe_flags(run: RunRecord) -> list[str]:
    return ["disable_dp"] * run.without_privacy + ["fixed_randomness"] * (not run.secret_randomness)


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
