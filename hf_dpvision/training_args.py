"""`TrainingArguments` with the privacy arguments. Strings become objects here and only here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .checkpointing_arguments import CheckpointingArguments
from .clipping_arguments import CLIPPINGS, SHARES, STYLES, ClippingArguments
from .errors import ArgumentRefused
from .numeric import is_count, is_number
from .optimisation_arguments import OptimisationArguments
from .report_arguments import ReportArguments
from .rules.cost import NormRule
from .secure_noise import refuse_missing
from .sharding import Sharding
from .stream_arguments import StreamArguments
from .streaming import Way
from .unit_arguments import PRIVACY_UNITS, UnitArguments


ACCOUNTANTS = ("prv", "pld", "rdp")
EVAL_DATA = ("private", "public")
_NUMBERS = ("target_epsilon", "noise_multiplier", "target_delta", "per_sample_max_grad_norm", "logical_batch_size",
            "dataloader_timeout", "memory_bound")  # fmt: skip
_AUTO = "auto"


@dataclass
class DPTrainingArguments(
    ClippingArguments, UnitArguments, StreamArguments, OptimisationArguments, ReportArguments, CheckpointingArguments,
    TrainingArguments,
):
    """Arguments of `DPTrainer`: those of `TrainingArguments`, and the following.

    Exactly one of `target_epsilon` and `noise_multiplier` is given, unless `disable_dp` is set; `target_delta` and
    `logical_batch_size` are always meant explicitly. Changed defaults: `max_grad_norm` 0 (the bound of the guarantee
    is `per_sample_max_grad_norm`), `remove_unused_columns` False (images are transformed on the fly), `label_names`
    `["labels"]`, `logging_steps` 10, `save_total_limit` 2, `average_tokens_across_devices` False.

    `push_to_hub=True` uploads the weights, what is needed to use them, the card, `privacy.json` and the ledger; see
    `release.py`. With `hub_strategy="every_save"`, the default, that happens at every checkpoint.

    Raises:
        ArgumentRefused: A privacy argument is missing, contradicts another one, or is out of range.
    """

    target_epsilon: float | None = field(
        default=None,
        metadata={"help": "Privacy budget: the noise multiplier is calibrated so that epsilon ends at most here."},
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "Noise std divided by the clip norm, instead of target_epsilon."},
    )
    target_delta: float | None = field(
        default=None,
        metadata={"help": "Delta of the guarantee, below 1 / number of training examples, for example 1e-5."},
    )
    logical_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Expected number of examples, or units, per optimizer step, over all devices. "
            "per_device_train_batch_size is only what fits a device; it changes neither the privacy nor the result."
        },
    )
    norm_rule: NormRule | str = field(
        default="auto",
        metadata={
            "help": "How norms of single examples' gradients are computed: 'auto' by cost, 'mixed' by the rule of "
            "mixed ghost clipping, 'ghost' or 'instantiate' everywhere. The result is the same."
        },
    )
    backward_passes: int | None = field(
        default=None,
        metadata={
            "help": "1 keeps what the clipped sum needs; 2 needs less memory and more time. By default 1, but 2 with "
            "activation_checkpointing or fsdp, whose saving of memory would be lost otherwise.",
            "choices": [1, 2],
        },
    )
    augmentation_multiplicity: int = field(
        default=1,
        metadata={
            "help": "So many views of each drawn image, from random transforms; their gradients are averaged before "
            "clipping, so that the privacy is the same (De et al. 2022, arXiv:2204.13650). A step takes as many times "
            "longer; per_device_train_batch_size counts views."
        },
    )
    memory_bound: float = field(
        default=1.05,
        metadata={
            "help": "With norm_rule 'auto', the memory a step may take, as a ratio to training without privacy: "
            "the fastest kernels within it, and where none stay within it the leanest, in one backward pass or two. "
            "The result is the same."
        },
    )
    accountant: str = field(
        default="prv",
        metadata={
            "help": "Which accountant bounds epsilon: 'prv', 'pld' (needs the extra 'verify') or 'rdp'.",
            "choices": list(ACCOUNTANTS),
        },
    )
    eval_data: str = field(
        default="private",
        metadata={
            "help": "Whether the evaluation data may be seen by everyone. Only then may training react to metrics "
            "(best checkpoint, early stopping, plateau schedules), and only then do they stand on the card: the "
            "guarantee does not cover them. Otherwise they are logged with the mark eval_metrics_are_private.",
            "choices": list(EVAL_DATA),
        },
    )
    secure_noise: bool = field(
        default=False,
        metadata={
            "help": "Draw the noise from AES-256 (extra 'secure'), so that draws cannot be computed from other draws. "
            "Attacks on the rounding of floating-point noise stay uncovered."
        },
    )
    train_data_name: str | None = field(
        default=None,
        metadata={"help": "Public name of the training data, such as its Hub id, for the privacy statement."},
    )
    disable_dp: bool = field(
        default=False,
        metadata={
            "help": "Train without privacy through the same data path: the baseline to compare with. Epsilon is "
            "infinite, and the saved statement says so."
        },
    )
    self_check: bool = field(
        default=True,
        metadata={"help": "Before training, compare clipped gradients with a loop over random single examples."},
    )

    dataloader_timeout: float = field(
        default=1800,
        metadata={
            "help": "Seconds to wait for the examples of a microbatch from loading workers before the run is ended, "
            "to be resumed; 0 waits forever."
        },
    )

    per_device_train_batch_size: int | str = field(  # type: ignore[assignment]  # a number behind __post_init__
        default=8,
        metadata={
            "help": "Most examples on a device at once; changes neither the privacy nor the result. In Python also "
            "'auto', which is auto_find_batch_size."
        },
    )
    auto_find_batch_size: bool = field(
        default=False,
        metadata={
            "help": "Find the largest per_device_train_batch_size that fits, on random examples before the first step."
        },
    )
    full_determinism: bool = field(
        default=False,
        metadata={
            "help": "As in TrainingArguments; besides, sums are exact: with the same draws, noise, devices, threads "
            "(torchrun sets OMP_NUM_THREADS=1) and per_device_train_batch_size the weights are the same bit for bit, "
            "whatever the number of processes. Not covered: dropout and random transforms, which draw in each "
            "process, disable_dp, and a batch that had to be halved for want of memory. Real draws and noise stay "
            "secret and new. Sums take float64, and more time."
        },
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: it would clip the noisy gradient."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model's forward does not name."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "The one key of the inputs that holds the labels."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, a fraction of all steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints kept."})
    average_tokens_across_devices: bool = field(
        default=False, metadata={"help": "Has no effect: losses are per example."}
    )

    def __post_init__(self) -> None:
        # Trainer's own search restarts the loop with weights that are trained already; it must see False
        self.finds_batch_size = self.auto_find_batch_size or self.per_device_train_batch_size == _AUTO
        self.auto_find_batch_size = False
        if self.per_device_train_batch_size == _AUTO:
            self.per_device_train_batch_size = type(self).per_device_train_batch_size
        self.join_checkpointing_names()
        super().__post_init__()
        self.settle_checkpointing()
        # torch would pin nothing, and warn at every loader
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        # accelerate's FSDP averages gradients and knows no CPU; the shards are made by torch's FSDP2 directly
        self.fsdp_plugin_args = None
        # Counts labels of the realised batches across processes; the loss here is per example and needs no count.
        self.average_tokens_across_devices = False
        if self.backward_passes is None:
            self.backward_passes = 2 if self.activation_checkpointing or self.fsdp else 1
        self.derive_unit()
        self.refuse_report()
        self._check_choices()
        self._check_numbers()
        self._check_timeout()
        self._check_batch()
        self.check_optimisation(self.optim, self.disable_dp)
        if not self.disable_dp:
            self._check_budget()
        self.norm_rule = NormRule(self.norm_rule)
        if self.secure_noise:
            refuse_missing()
        self.refuse_clipping()
        self.build_clipping()
        self.build_streaming(self.output_dir)

    def build_sharding(self) -> Sharding | None:
        """Return how the model is spread over the processes; None if each of them has all of it."""
        if not self.fsdp:
            return None
        config = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}  # made one by TrainingArguments
        classes = config.get("transformer_layer_cls_to_wrap") or ()
        return Sharding(tuple(classes), bool(config.get("reshard_after_forward", True)))

    @property
    def sums_exactly(self) -> bool:
        """Whether sums do not depend on the number of processes; without a clip norm there is no grid for them."""
        return self.full_determinism and not self.disable_dp

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether `Trainer` moves the model to the device: not if it is sharded, since it may not fit there."""
        return False if self.fsdp else super().place_model_on_device

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows that something takes long."""
        return self.should_log and not self.disable_tqdm

    @property
    def rows_per_unit(self) -> int:
        """How many rows of a microbatch are clipped as one: all views of all examples of a unit in one step."""
        return self.augmentation_multiplicity * (self.examples_per_unit or 1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out of `training_args.bin`: the file is not uploaded, but lies in every checkpoint."""
        return {**self.__dict__, "hub_token": None}

    def _check_choices(self) -> None:
        allowed = {
            "clipping": CLIPPINGS,
            "group_clipping": tuple(STYLES),
            "clipping_shares": SHARES,
            "norm_rule": tuple(rule.value for rule in NormRule),
            "backward_passes": (1, 2),
            "accountant": ACCOUNTANTS,
            "eval_data": EVAL_DATA,
            "privacy_unit": PRIVACY_UNITS,
            "stream_sampling": tuple(way.value for way in Way),
        }
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ArgumentRefused(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, choices))}.")

    def _check_numbers(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise ArgumentRefused(
                    f"{name}={value!r} is a {type(value).__name__} and not a number. In YAML write 1.0e-5, because "
                    "1e-5 is read as text."
                )

    def _check_timeout(self) -> None:
        if not 0 < self.memory_bound:
            raise ArgumentRefused(
                f"memory_bound={self.memory_bound!r} is not a positive ratio to the memory of training without "
                "privacy. 1.05 allows five percent more."
            )
        if not 0 <= self.dataloader_timeout < math.inf:
            raise ArgumentRefused(
                f"dataloader_timeout={self.dataloader_timeout!r}: a number of seconds is needed, or 0 to wait forever."
            )

    def _check_batch(self) -> None:
        size = self.logical_batch_size
        if size is None or not math.isfinite(size) or size != int(size) or size < 1:
            raise ArgumentRefused(
                f"logical_batch_size={size!r}: the expected number of examples per optimizer step, over all devices, "
                "fixes the sample rate and what the noise is divided by, so it must be given as a whole number of at "
                "least 1. Larger is better for accuracy at a given epsilon; 1000 is a good start for 50,000 images."
            )
        self.logical_batch_size = int(size)
        views = self.augmentation_multiplicity
        if not is_count(views):
            raise ArgumentRefused(
                f"augmentation_multiplicity={views!r}: so many views of each image are averaged, so it is a whole "
                "number of at least 1. Try 4 or 8 with a random crop and flip."
            )
        if self.label_names is None or len(self.label_names) != 1:
            raise ArgumentRefused(
                f"label_names={self.label_names!r}: the per-example loss takes its labels from exactly one key of the "
                "inputs. Leave it at ['labels']."
            )

    def _check_budget(self) -> None:
        epsilon, sigma, delta = self.target_epsilon, self.noise_multiplier, self.target_delta
        if (epsilon is None) == (sigma is None):
            raise ArgumentRefused(
                f"target_epsilon={epsilon!r} and noise_multiplier={sigma!r}: exactly one of them decides how much "
                "noise is added. Give target_epsilon to have the noise calibrated, or noise_multiplier to have "
                "epsilon computed; disable_dp=True trains without privacy."
            )
        if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
            raise ArgumentRefused(
                f"target_epsilon={epsilon!r} is not a positive finite number, and no amount of noise reaches it. "
                "Values from 1 to 8 are usual; disable_dp=True trains without privacy."
            )
        if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
            raise ArgumentRefused(
                f"noise_multiplier={sigma!r} is not a positive finite number, so nothing would be protected. "
                "Values from 0.5 to 5 are usual; disable_dp=True trains without privacy."
            )
        if delta is None or not 1e-12 <= delta < 0.5:
            raise ArgumentRefused(
                f"target_delta={delta!r} must be given, in [1e-12, 0.5) and below 1 / number of training examples: "
                "it bounds the probability that the guarantee fails altogether. 1e-5 suits up to 10,000 images, "
                "1e-6 up to 100,000."
            )

