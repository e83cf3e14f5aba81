"""Every refusal before step 0 that concerns the trainer: launcher, model, data, callbacks (arguments: next door).

Nothing is spent yet when these run. Each message says what was found, why it breaks privacy or arithmetic, and what
to do instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import has_length

from .data.examples import same_rows
from .data.grouping import Units, group_rows, refuse_repeated_ids
from .errors import ArgumentRefused, DataRefused, ModelRefused
from .guards_arguments import ONE_DEVICE, PUBLIC, SELECTION, SHARDED, has_private_metrics
from .training_args import DPTrainingArguments


logger = logging.getLogger(__name__)

# Below and above these the guarantee is true and says little.
_LITTLE_NOISE, _LARGE_EPSILON, _FEW_EXAMPLES = 0.3, 20, 100


def refuse_accelerator(accelerator: Accelerator) -> None:
    """Raise if the launcher's environment switched on what the arguments did not ask for.

    Raises:
        ArgumentRefused: fp16 or fp8, compilation, or a kind of parallelism other than one process per device.
    """
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ArgumentRefused(
            f"mixed_precision={accelerator.mixed_precision!r} was set by the launcher or its configuration file, "
            "whatever the arguments say: loss scaling changes the norms of single examples, and skipped steps depend "
            "on private data. Launch with --mixed_precision bf16 or no."
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ArgumentRefused(
            f"dynamo_backend={backend.value!r} was set by the launcher or its configuration file: compiled code hides "
            "the operations whose per-example gradients are clipped. Launch with --dynamo_backend no."
        )
    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in allowed:
        raise ArgumentRefused(f"distributed_type={accelerator.distributed_type.value!r}: {SHARDED}. {ONE_DEVICE}")


def refuse_model(model: nn.Module) -> None:
    """Raise if no per-example gradient exists for this module, or the clipped sum could not be held exactly.

    Raises:
        ModelRefused: naming the module or the parameter.
    """
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.distributed.fsdp.FullyShardedDataParallel,
        torch.distributed.fsdp.FSDPModule,
        torch._dynamo.OptimizedModule,
    )
    if isinstance(model, wrappers):
        raise ModelRefused(
            f"The model is wrapped in {type(model).__name__}, which reduces or fuses gradients before single examples "
            "can be clipped. Pass the module inside; several processes are handled by DPTrainer."
        )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ModelRefused(
            "The model has no trainable parameter: every step would spend budget and change nothing. "
            "Set requires_grad_(True) on what is to be trained, for example the head."
        )
    for name, parameter in trainable:
        if parameter.is_meta:
            raise ModelRefused(f"Parameter {name!r} is on the meta device and has no values. Load the weights first.")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ModelRefused(
                f"Parameter {name!r} is {parameter.dtype}: updates at usual learning rates are rounded away, and "
                "clipped sums lose the digits the guarantee rests on. Call model.float(); bf16=True still computes "
                "in bfloat16."
            )
    _refuse_backward_hooks(model)
    _refuse_running_statistics(model)


def refuse_reducing(model: nn.Module) -> None:
    """Raise if the model was wrapped between `_wrap_model` and the first step, by accelerate before 1.14 for example.

    Raises:
        ModelRefused: gradients would cross processes before single examples are clipped.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelRefused(
            "accelerate has wrapped the model in DistributedDataParallel although it was prepared without: gradients "
            "would be reduced before single examples can be clipped. Install accelerate 1.15 or newer."
        )


def refuse_clipping(model: nn.Module, args: DPTrainingArguments) -> None:
    """Raise if the groups of parameters that are to be clipped leave one out.

    Raises:
        ArgumentRefused: naming the parameter.
    """
    if not args.disable_dp:
        args.build_clipping().over({name: p.numel() for name, p in model.named_parameters() if p.requires_grad})


def refuse_resuming_shards(model: nn.Module, resume_from_checkpoint: str | bool | None) -> None:
    """Raise if a checkpoint is to be loaded into a model that an earlier `train()` has spread over processes.

    Raises:
        ArgumentRefused: a checkpoint holds whole tensors, and they are checked against a whole model.
    """
    if resume_from_checkpoint and isinstance(model, torch.distributed.fsdp.FSDPModule):
        raise ArgumentRefused(
            f"{resume_from_checkpoint=}: an earlier train() has spread this model over the processes, and a "
            "checkpoint is loaded completely or not at all. Resume with a new DPTrainer and a model that is in one "
            "piece."
        )


def _refuse_backward_hooks(model: nn.Module) -> None:
    modules = [f"module {name!r}" for name, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    parameters = [
        f"parameter {name!r}"
        for name, p in model.named_parameters()
        if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    if found := modules + parameters:
        raise ModelRefused(
            f"{found[0]} and {len(found) - 1} more have backward hooks: another library (a second engine for "
            "differential privacy, or an optimizer that steps inside the backward pass) is attached to this model, "
            "and sees or changes gradients before they are clipped. Pass a model to which nothing is attached."
        )


def _refuse_running_statistics(model: nn.Module) -> None:
    was_training = {module: module.training for module in model.modules()}
    model.train()  # a layer that is frozen for good stays in evaluation mode here
    found = [(name, module) for name, module in model.named_modules() if _sees_other_examples(module)]
    for module, training in was_training.items():
        module.training = training
    if found:
        name, module = found[0]
        raise ModelRefused(
            f"Layer {name!r} ({type(module).__module__}.{type(module).__qualname__}) and {len(found) - 1} more are in "
            "training mode while training: they mix the examples of a batch, or write statistics of private examples "
            'into the saved weights. Load the model with load_model(..., replace_batchnorm="group") for GroupNorm, or '
            '"freeze" to use the stored statistics.'
        )


def _sees_other_examples(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


def group_units(dataset: Any, args: DPTrainingArguments) -> Units | None:
    """Return the rows of each unit of privacy; None where every example is a unit of its own.

    Raises:
        DataRefused: the training set cannot be drawn from; it has no such columns; a unit or an id is missing; or two
            rows have the same id.
    """
    _refuse_kind(dataset)
    if args.id_column is not None:
        refuse_repeated_ids(dataset, args.id_column)
    return None if args.privacy_unit_column is None else group_rows(dataset, args.privacy_unit_column)


def refuse_dataset(dataset: Any, args: DPTrainingArguments, units: Units | None = None) -> int:
    """Raise if logical batches cannot be drawn from the training set; return its size N, which counts as public.

    Args:
        dataset: the training set.
        args: of the trainer.
        units: the rows of each unit, if rows are grouped; N is their number then.

    Raises:
        DataRefused: no training set, a stream of an unknown kind, an empty set, or a delta that protects nobody in it.
        ArgumentRefused: the expected batch is larger than the set.
    """
    _refuse_kind(dataset)
    size, noun = (len(dataset), "example") if units is None else (len(units), "unit")
    if args.logical_batch_size > size:
        raise ArgumentRefused(
            f"logical_batch_size={args.logical_batch_size} is larger than the training set of {size} {noun}s, so the "
            f"sample rate would exceed 1. Choose at most {size}."
        )
    if not args.disable_dp and args.target_delta * size >= 1:
        raise ArgumentRefused(
            f"target_delta={args.target_delta} is not below 1 / {size} {noun}s: publishing one whole {noun} would "
            f"satisfy such a guarantee. Choose about {1 / (10 * size):.0e}."
        )
    return size


def _refuse_kind(dataset: Any) -> None:
    if dataset is None:
        raise DataRefused("train_dataset is None: there is nothing to train on. Pass it to DPTrainer.")
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise DataRefused(
            "train_dataset is a DataLoader, which brings its own sampler: the accounting holds only for Poisson "
            "sampling, which DPTrainer does itself. Pass the data set inside, dataloader.dataset."
        )
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        raise DataRefused(
            f"train_dataset is a {type(dataset).__module__}.{type(dataset).__qualname__}, a stream without random "
            "access: a shuffle buffer is not Poisson sampling, and the accounting would not hold. Pass it as a "
            "datasets.IterableDataset, for example IterableDataset.from_generator(...): it is then sampled as "
            "stream_sampling says. Or pass a map-style data set."
        )
    if len(dataset) == 0:
        raise DataRefused("train_dataset is empty: no example could ever be drawn. Check the split and the filters.")


def warn_of_little_protection(args: DPTrainingArguments, dataset_size: int) -> None:
    """Warn, in the main process, of a guarantee that will be true and say little."""
    if args.disable_dp or args.process_index != 0:
        return
    batch, noun = args.logical_batch_size, args.privacy_unit
    if args.noise_multiplier is not None and args.noise_multiplier < _LITTLE_NOISE:
        logger.warning(
            "noise_multiplier=%g is below %g: little protection; look at the epsilon it leads to.",
            args.noise_multiplier,
            _LITTLE_NOISE,
        )
    if args.target_epsilon is not None and args.target_epsilon > _LARGE_EPSILON:
        logger.warning("target_epsilon=%g: little protection. Values from 1 to 8 are usual.", args.target_epsilon)
    if dataset_size < _FEW_EXAMPLES:
        logger.warning(
            "The training set has %d %ss: noise that hides one of so few hides most of what they have in common.",
            dataset_size,
            noun,
        )
    if batch < dataset_size < 2 * batch:
        logger.warning(
            "logical_batch_size=%d is more than half of the %d training %ss: sampling hardly lowers epsilon.",
            batch,
            dataset_size,
            noun,
        )


def refuse_callbacks(callbacks: Iterable[TrainerCallback], args: DPTrainingArguments) -> None:
    """Raise for a callback that lets training react to private metrics.

    Raises:
        ArgumentRefused: early stopping without `eval_data="public"`.
    """
    if has_private_metrics(args) and not args.disable_dp:
        for callback in callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                raise ArgumentRefused(f"{type(callback).__name__}: {SELECTION}. Remove it. {PUBLIC}")


def refuse_optimizer(
    optimizer: torch.optim.Optimizer | None,
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> None:
    """Raise for an optimizer, given or to be made, that evaluates the gradient several times in one step.

    Raises:
        ArgumentRefused: L-BFGS.
    """
    to_be_made = optimizer_cls_and_kwargs is not None and issubclass(optimizer_cls_and_kwargs[0], torch.optim.LBFGS)
    if isinstance(optimizer, torch.optim.LBFGS) or to_be_made:
        raise ArgumentRefused(
            "The optimizer LBFGS evaluates the private data several times in one step, and only one evaluation is "
            "accounted. Use an optimizer that needs one gradient per step, such as SGD or AdamW."
        )


def refuse_evaluation_on_training_data(eval_dataset: Any, train_dataset: Any, args: DPTrainingArguments) -> None:
    """Raise if metrics of the private training data would be logged.

    Raises:
        ArgumentRefused: `eval_dataset`, or one of several, is the training set itself or has the same rows.
    """
    candidates = eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)
    if not args.disable_dp and any(one is not None and same_rows(one, train_dataset) for one in candidates):
        raise ArgumentRefused(
            "eval_dataset is the training set: its metrics would be logged and saved, outside the guarantee. Evaluate "
            "on held-out data, or look at predict(), whose result stays in this process."
        )
