"""Every refusal before step 0 that concerns the trainer: launcher, model, data, callbacks (arguments: next door).

Nothing is spent yet when these run. Each message says what was found, why it breaks privacy or arithmetic, and what
to do instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import has_length

from .errors import ArgumentRefused, DataRefused, ModelRefused
from .guards_arguments import ONE_DEVICE, PUBLIC, SELECTION, SHARDED, has_private_metrics
from .training_args import DPTrainingArguments


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
    _refuse_running_statistics(model)


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


def refuse_dataset(dataset: Any, args: DPTrainingArguments) -> int:
    """Raise if logical batches cannot be drawn from the training set; return its size, which counts as public.

    Raises:
        DataRefused: no training set, a stream, an empty set, or a delta that protects nobody in it.
        ArgumentRefused: the expected batch is larger than the set.
    """
    if dataset is None:
        raise DataRefused("train_dataset is None: there is nothing to train on. Pass it to DPTrainer.")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        raise DataRefused(
            f"train_dataset is a {type(dataset).__module__}.{type(dataset).__qualname__}, a stream without random "
            "access: a shuffle buffer is not Poisson sampling, and the accounting would not hold. Write the stream "
            "to disk once and pass the map-style data set, for example datasets.Dataset.from_generator(...)."
        )
    size = len(dataset)
    if size == 0:
        raise DataRefused("train_dataset is empty: no example could ever be drawn. Check the split and the filters.")
    if args.logical_batch_size > size:
        raise ArgumentRefused(
            f"logical_batch_size={args.logical_batch_size} is larger than the training set of {size} examples, so the "
            f"sample rate would exceed 1. Choose at most {size}."
        )
    if not args.disable_dp and args.target_delta * size >= 1:
        raise ArgumentRefused(
            f"target_delta={args.target_delta} is not below 1 / {size} examples: publishing one whole example would "
            f"satisfy such a guarantee. Choose about {1 / (10 * size):.0e}."
        )
    return size


def refuse_callbacks(callbacks: Iterable[TrainerCallback], args: DPTrainingArguments) -> None:
    """Raise for a callback that lets training react to private metrics.

    Raises:
        ArgumentRefused: early stopping without `eval_data="public"`.
    """
    if has_private_metrics(args) and not args.disable_dp:
        for callback in callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                raise ArgumentRefused(f"{type(callback).__name__}: {SELECTION}. Remove it. {PUBLIC}")


def refuse_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Raise for an optimizer that evaluates the gradient several times in one step.

    Raises:
        ArgumentRefused: L-BFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentRefused(
            "optimizers: LBFGS evaluates the private data several times in one step, and only one evaluation is "
            "accounted. Use an optimizer that needs one gradient per step, such as SGD or AdamW."
        )


def refuse_evaluation_on_training_data(eval_dataset: Any, train_dataset: Any, args: DPTrainingArguments) -> None:
    """Raise if metrics of the private training data would be logged.

    Raises:
        ArgumentRefused: `eval_dataset`, or one of several, is the training set itself.
    """
    candidates = eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)
    if not args.disable_dp and any(one is train_dataset and one is not None for one in candidates):
        raise ArgumentRefused(
            "eval_dataset is the training set: its metrics would be logged and saved, outside the guarantee. Evaluate "
            "on held-out data, or look at predict(), whose result stays in this process."
        )
