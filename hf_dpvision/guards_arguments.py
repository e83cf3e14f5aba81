"""The table of training arguments that cannot be combined with private training, and why.

Nothing is spent yet when it is consulted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, cast

from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType
from transformers.training_args import DebugOption, OptimizerNames

from .errors import ArgumentRefused
from .numeric import is_count
from .training_args import DPTrainingArguments


SELECTION = "it chooses by metrics on evaluation data that the guarantee does not cover"
PUBLIC = 'If everyone may see the evaluation data, say so with eval_data="public"; otherwise keep the last checkpoint.'
SHARDED = "gradients are sharded or fused before single examples can be clipped"
ONE_DEVICE = "Use one process per device with plain torchrun or accelerate launch."


@dataclass(frozen=True)
class _Row:
    """One line of the table of refused arguments."""

    name: str
    refused: Callable[[DPTrainingArguments], bool]
    why: str
    remedy: str
    only_private: bool = False  # a leak rather than wrong arithmetic: allowed with disable_dp


_FUSED_BACKWARD = {
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
}
_PLATEAU = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}


def has_private_metrics(args: DPTrainingArguments) -> bool:
    """Whether metrics on the evaluation data may not be seen by everyone."""
    return args.eval_data != "public"


def _accumulates(args: DPTrainingArguments) -> bool:
    inner = cast(AcceleratorConfig, args.accelerator_config).gradient_accumulation_kwargs or {}
    return args.gradient_accumulation_steps != 1 or inner.get("num_steps", 1) != 1


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_name(column: object) -> bool:
    return column is None or isinstance(column, str) and bool(column)


def _is_count_of(column: object, most: object) -> bool:
    if column is None or most is None:
        return column is most
    return is_count(most)


# What Trainer fills in, and the only values that change nothing; two further keys are used.
_PLAIN_SHARDING = {
    "min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False, "version": 2,
    "cpu_offload": False, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": False,
}  # fmt: skip
_USED_SHARDING = {"reshard_after_forward", "transformer_layer_cls_to_wrap"}


def _unsupported_sharding(config: dict[str, Any] | str | None) -> bool:
    if not isinstance(config, dict):
        return True
    return any(_PLAIN_SHARDING.get(key) != value for key, value in config.items() if key not in _USED_SHARDING)


_TABLE = (
    _Row(
        "max_steps",
        lambda args: not isinstance(args.max_steps, Integral),
        "noise is calibrated for a whole number of steps",
        "Give a positive whole number, or leave it at -1 and set num_train_epochs.",
    ),
    _Row(
        "num_train_epochs",
        lambda args: not _is_finite(args.num_train_epochs),
        "no finite number of steps follows from it, so no budget can be planned",
        "Give a positive finite number, or set max_steps.",
    ),
    _Row(
        "gradient_accumulation_steps",
        _accumulates,
        "one optimizer step is one Poisson-sampled logical batch, cut into microbatches automatically",
        "Leave it at 1 and set logical_batch_size; per_device_train_batch_size is what fits the device.",
    ),
    _Row(
        "max_grad_norm",
        lambda args: bool(args.max_grad_norm),
        "it would clip the gradient after the noise was added and shrink every update",
        "Leave it at 0; the bound of the guarantee is per_sample_max_grad_norm.",
    ),
    _Row(
        "fp16",
        lambda args: args.fp16,
        "loss scaling changes the norms of single examples, and skipped steps depend on private data",
        "Use bf16=True or full precision.",
    ),
    _Row(
        "auto_find_batch_size",
        lambda args: args.auto_find_batch_size,
        "set after the arguments were made it would restart the loop with weights that are trained already, and steps "
        "would go uncounted",
        "Pass it to DPTrainingArguments, which finds the size before the first step.",
    ),
    _Row(
        "per_device_train_batch_size",
        lambda args: args.finds_batch_size and bool(args.fsdp),
        "with fsdp what fits depends on what the other processes hold",
        "Give a number with fsdp.",
    ),
    _Row(
        "torch_compile",
        lambda args: args.torch_compile,
        "compiled code hides the operations whose per-example gradients are clipped",
        "Leave it off.",
    ),
    _Row(
        "enable_jit_checkpoint",
        lambda args: args.enable_jit_checkpoint,
        "it saves in the middle of a step, when the ledger has one step more than the weights",
        "Leave it off: on SIGTERM, training ends behind its step, with a checkpoint and exit code 143.",
    ),
    _Row("deepspeed", lambda args: bool(args.deepspeed), SHARDED, ONE_DEVICE),
    _Row(
        "fsdp",
        lambda args: bool(args.fsdp) and args.world_size == 1,
        "there is one process, and nothing to spread the model over",
        "Start several with torchrun or accelerate launch --multi_gpu, or leave it off.",
    ),
    _Row(
        "fsdp_config",
        lambda args: bool(args.fsdp) and _unsupported_sharding(args.fsdp_config),
        "parameters and sums stay in float32 on the device, in shards of FSDP2, and activations are checkpointed by "
        "the blocks themselves",
        "Set only reshard_after_forward and transformer_layer_cls_to_wrap; activation_checkpointing and bf16 are "
        "arguments of their own.",
    ),
    _Row(
        "backward_passes",
        lambda args: bool(args.fsdp) and args.backward_passes == 1,
        "with fsdp a block's parameters are gone when the factors are known, so that the sums take a second pass",
        "Leave it unset, or set it to 2.",
    ),
    _Row(
        "full_determinism",
        lambda args: args.sums_exactly and bool(args.fsdp),
        "with fsdp sums are formed by torch, block by block, in an order that depends on the number of processes",
        "Leave one of the two off.",
    ),
    _Row(
        "full_determinism",
        lambda args: args.sums_exactly and args.finds_batch_size,
        "every process finds its own per_device_train_batch_size, and the gradient of another microbatch is rounded "
        "otherwise",
        "Give the size as a number.",
    ),
    _Row(
        "full_determinism",
        lambda args: args.sums_exactly and args.device.type == "mps",
        "sums that do not depend on their order take float64, which this device does not have",
        "Leave it off, or set use_cpu=True.",
    ),
    _Row("parallelism_config", lambda args: args.parallelism_config is not None, SHARDED, ONE_DEVICE),
    _Row(
        "use_liger_kernel",
        lambda args: args.use_liger_kernel,
        "it replaces modules by fused kernels that no per-example rule sees into",
        "Leave it off.",
    ),
    _Row(
        "neftune_noise_alpha",
        lambda args: args.neftune_noise_alpha is not None,
        "it hooks the embedding of a language model; in a vision model that is the patch projection",
        "Leave it unset.",
    ),
    _Row(
        "optim",
        lambda args: args.optim in _FUSED_BACKWARD,
        "it updates parameters inside the backward pass, before clipping and noise",
        'Use an optimizer that steps after the backward pass, such as "adamw_torch" or "sgd".',
    ),
    _Row(
        "train_sampling_strategy",
        lambda args: args.train_sampling_strategy != "random",
        "the accounting holds for Poisson sampling only",
        "Leave it unset: logical batches are always Poisson-sampled.",
    ),
    _Row(
        "privacy_unit",
        lambda args: args.privacy_unit != ("example" if args.privacy_unit_column is None else "unit"),
        "it contradicts privacy_unit_column, and the claim would be about others than are protected",
        "Leave it unset and give privacy_unit_column, or not, to DPTrainingArguments; the unit follows from that.",
    ),
    _Row(
        "privacy_unit_column",
        lambda args: not _is_name(args.privacy_unit_column),
        "rows cannot be grouped by it",
        "Give the name of a column of the training data.",
    ),
    _Row(
        "examples_per_unit",
        lambda args: not _is_count_of(args.privacy_unit_column, args.examples_per_unit),
        "with privacy_unit_column it is a whole number of at least 1, and without it no example has a unit",
        "Give both, or neither; about as many as most units have is a good choice.",
    ),
    _Row(
        "id_column",
        lambda args: not _is_name(args.id_column),
        "rows cannot be told apart by it",
        "Give the name of a column of the training data.",
    ),
    _Row(
        "id_column",
        lambda args: args.id_column is not None and args.id_column == args.privacy_unit_column,
        "it is privacy_unit_column as well, and values that all differ make every example a unit of its own",
        "Leave one of them unset.",
    ),
    _Row(
        "dataloader_drop_last",
        lambda args: args.dataloader_drop_last,
        "there is no last batch to drop: every logical batch is an independent draw",
        "Leave it off.",
    ),
    _Row(
        "ignore_data_skip",
        lambda args: args.ignore_data_skip,
        "a resumed epoch would use the draws of its first steps again, which the accounting counts as independent",
        "Leave it off; skipping costs no data loading here.",
    ),
    _Row(
        "include_num_input_tokens_seen",
        lambda args: args.include_num_input_tokens_seen != "no",
        "it logs the realised batch sizes, which depend on who was sampled",
        "Leave it off; logical_batch_size is the public figure.",
    ),
    _Row(
        "lr_scheduler_type",
        lambda args: args.lr_scheduler_type in _PLATEAU and has_private_metrics(args),
        SELECTION,
        'Use a schedule that depends on the step alone, such as "cosine". ' + PUBLIC,
        only_private=True,
    ),
    _Row(
        "load_best_model_at_end",
        lambda args: args.load_best_model_at_end and has_private_metrics(args),
        SELECTION,
        PUBLIC,
        only_private=True,
    ),
    _Row(
        "save_strategy",
        lambda args: args.save_strategy == SaveStrategy.BEST and has_private_metrics(args),
        SELECTION,
        PUBLIC,
        only_private=True,
    ),
    _Row(
        "metric_for_best_model",
        lambda args: args.metric_for_best_model is not None and has_private_metrics(args),
        SELECTION,
        PUBLIC,
        only_private=True,
    ),
    _Row(
        "debug",
        lambda args: DebugOption.UNDERFLOW_OVERFLOW in args.debug,
        "it prints statistics of the activations of private examples",
        "Debug with disable_dp=True on data that is not private.",
        only_private=True,
    ),
    _Row(
        "skip_memory_metrics",
        lambda args: not args.skip_memory_metrics,
        "memory in use depends on how many examples were drawn, and it would be logged",
        "Leave it on; measure memory with disable_dp=True.",
        only_private=True,
    ),
    _Row(
        "hub_strategy",
        lambda args: args.push_to_hub and args.hub_strategy in {HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS},
        "what a checkpoint needs to be resumed may not leave: random number generator states, the trainer's log with "
        "its metrics, pickles",
        'Use hub_strategy="every_save", which uploads the weights of every checkpoint with their statement, or "end".',
    ),
)


def refuse_arguments(args: DPTrainingArguments) -> None:
    """Raise for the first argument that cannot be combined with private training.

    Raises:
        ArgumentRefused: naming the argument, its value, the reason and the way out.
    """
    if not isinstance(args, DPTrainingArguments):
        raise ArgumentRefused(
            f"args is a {type(args).__name__}, which says neither how much noise to add nor which budget to keep. "
            "Pass a DPTrainingArguments."
        )
    for row in _TABLE:
        if row.refused(args) and not (row.only_private and args.disable_dp):
            raise ArgumentRefused(f"{row.name}={getattr(args, row.name)!r}: {row.why}. {row.remedy}")
