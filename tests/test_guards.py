"""Each refusal names what was found, and comes before anything is spent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from trainer_cases import Images, Linear, arguments, tiny_vit, trainer
from transformers import EarlyStoppingCallback, TrainingArguments

from hf_dpvision import DPTrainer, DPTrainingArguments, guards
from hf_dpvision.batchnorm import freeze, replace_batchnorm
from hf_dpvision.errors import ArgumentRefused, DataRefused, ModelRefused
from hf_dpvision.guards_arguments import refuse_arguments


BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 logical_batch_size"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "gradient_accumulation_steps logical_batch_size",
        ),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 per_sample_max_grad_norm"),
        ({"fp16": True}, "fp16=True bf16"),
        ({"torch_compile": True}, "torch_compile=True off"),
        ({"deepspeed": {"train_batch_size": 8}}, "deepspeed sharded"),
        ({"fsdp": True}, "fsdp=True one process torchrun"),
        ({"full_determinism": True, "auto_find_batch_size": True}, "full_determinism=True finds number"),
        ({"parallelism_config": object()}, "parallelism_config sharded"),
        ({"use_liger_kernel": True}, "use_liger_kernel fused"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha=1.0"),
        ({"optim": "lomo"}, "optim backward sgd"),
        ({"optim": "galore_adamw_layerwise"}, "optim backward"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy Poisson"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True independent"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen batch sizes"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
            "lr_scheduler_type public cosine",
        ),
        ({"load_best_model_at_end": True, **BEST}, "load_best_model_at_end public"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy public"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model public"),
        ({"debug": "underflow_overflow"}, "debug activations"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "hub_strategy every_save"),
        ({"skip_memory_metrics": False}, "skip_memory_metrics drawn disable_dp"),
    ],
)
def test_an_incompatible_argument_is_refused_with_a_remedy(tmp_path, changes, words):
    late = ("fp16", "deepspeed", "fsdp", "parallelism_config")
    after = {name: changes.pop(name) for name in late if name in changes}
    args = arguments(tmp_path, **changes)
    for name, value in after.items():  # their own machinery would start, or fail, where nothing is installed
        setattr(args, name, value)
    with pytest.raises(ArgumentRefused) as refusal:
        refuse_arguments(args)
    for word in words.split():
        assert word in str(refusal.value)


@pytest.mark.parametrize("changes", [{"load_best_model_at_end": True, **BEST}, {"metric_for_best_model": "accuracy"}])
def test_reacting_to_metrics_is_allowed_on_public_data_and_without_privacy(tmp_path, changes):
    assert refuse_arguments(arguments(tmp_path, eval_data="public", **changes)) is None
    assert refuse_arguments(arguments(tmp_path, disable_dp=True, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "name", "found", "words"),
    [
        ({"fsdp": True}, "world_size", 2, "fsdp .*order.*Leave"),
        ({}, "device", torch.device("mps"), "float64.*use_cpu=True"),
    ],
)
def test_sums_that_cannot_be_exact_are_refused_with_privacy(tmp_path, monkeypatch, changes, name, found, words):
    monkeypatch.setattr(DPTrainingArguments, name, found)
    args = arguments(tmp_path, full_determinism=True, **changes)
    with pytest.raises(ArgumentRefused, match=f"full_determinism=True: .*{words}"):
        refuse_arguments(args)
    args.disable_dp = True
    assert refuse_arguments(args) is None


def test_plain_training_arguments_are_refused(tmp_path):
    with pytest.raises(ArgumentRefused, match="DPTrainingArguments"):
        DPTrainer(Linear(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=Images())
    with pytest.raises(ArgumentRefused, match="DPTrainingArguments"):
        DPTrainer(Linear(), train_dataset=Images())


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16'"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
        ({"backend": DynamoBackend.INDUCTOR}, "dynamo_backend"),
        ({"distributed_type": DistributedType.FSDP}, "distributed_type='FSDP'"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "distributed_type='DEEPSPEED'"),
    ],
)
def test_what_the_launcher_switched_on_is_refused(found, word):
    plugin = SimpleNamespace(backend=found.get("backend", DynamoBackend.NO))
    accelerator = SimpleNamespace(
        mixed_precision=found.get("mixed_precision", "no"),
        distributed_type=found.get("distributed_type", DistributedType.NO),
        state=SimpleNamespace(dynamo_plugin=plugin),
    )
    with pytest.raises(ArgumentRefused, match=word):
        guards.refuse_accelerator(accelerator)


def test_dynamo_set_in_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ArgumentRefused, match="dynamo_backend"):
        trainer(tmp_path, Linear())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, track_running_stats=True)]
)
def test_a_layer_with_batch_statistics_is_refused_by_name(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    with pytest.raises(ModelRefused, match=r"Layer '1'.*replace_batchnorm"):
        guards.refuse_model(model)
    assert not norm.training  # the mode is put back


def test_frozen_parameters_do_not_make_batchnorm_acceptable():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)
    with pytest.raises(ModelRefused, match="BatchNorm2d"):
        guards.refuse_model(model)


def test_a_replaced_batchnorm_is_accepted():
    replaced = replace_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), freeze)
    assert guards.refuse_model(replaced) is None
    assert guards.refuse_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4))) is None


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (nn.DataParallel(nn.Linear(2, 2)), "DataParallel"),
        (torch.compile(nn.Linear(2, 2)), "OptimizedModule"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (nn.Linear(2, 2).half(), "float16"),
        (nn.Linear(2, 2).bfloat16(), "bfloat16"),
        (nn.Linear(2, 2, device="meta"), "meta device"),
    ],
)
def test_a_model_that_cannot_be_clipped_exactly_is_refused(model, word):
    with pytest.raises(ModelRefused, match=word):
        guards.refuse_model(model)


class Stream(torch.utils.data.IterableDataset):
    """Counts."""

    def __iter__(self):
        return iter(range(100))


@pytest.mark.parametrize(
    ("dataset", "error", "word"),
    [
        (None, DataRefused, "train_dataset is None"),
        (Images(0), DataRefused, "empty"),
        (Stream(), DataRefused, "Pass it as a datasets.IterableDataset"),
        (Images(5), ArgumentRefused, "logical_batch_size=8 .* 5 examples"),
    ],
)
def test_a_data_set_that_cannot_be_sampled_is_refused(tmp_path, dataset, error, word):
    with pytest.raises(error, match=word):
        guards.refuse_dataset(dataset, arguments(tmp_path))


def test_a_huggingface_stream_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_dict({"labels": list(range(20))}).to_iterable_dataset()
    with pytest.raises(DataRefused, match="Poisson"):
        guards.refuse_dataset(stream, arguments(tmp_path))


def test_a_delta_that_allows_publishing_one_example_is_refused(tmp_path):
    with pytest.raises(ArgumentRefused, match="target_delta=0.05"):
        guards.refuse_dataset(Images(64), arguments(tmp_path, target_delta=0.05))
    assert guards.refuse_dataset(Images(64), arguments(tmp_path, target_delta=0.05, disable_dp=True)) == 64


def test_a_model_that_was_wrapped_after_all_is_refused_with_nothing_charged(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)  # needs no processes so
    prepared = run.accelerator.prepare_optimizer
    monkeypatch.setattr(run.accelerator, "prepare", lambda model, optimizer: (wrapped, prepared(optimizer)))
    with pytest.raises(ModelRefused, match="wrapped.*accelerate 1.15"):
        run.train()
    assert run.epsilon().upper == 0


def test_early_stopping_on_private_data_is_refused(tmp_path):
    with pytest.raises(ArgumentRefused, match="EarlyStoppingCallback"):
        trainer(tmp_path, Linear(), callbacks=[EarlyStoppingCallback(1)])
    late = trainer(tmp_path, Linear())
    late.add_callback(EarlyStoppingCallback(1))
    with pytest.raises(ArgumentRefused, match="EarlyStoppingCallback"):
        late.train()


def test_an_optimizer_with_closures_is_refused(tmp_path):
    model = Linear()
    with pytest.raises(ArgumentRefused, match="LBFGS"):
        trainer(tmp_path, model, optimizers=(torch.optim.LBFGS(model.parameters()), None))


def test_evaluating_on_the_training_set_is_refused(tmp_path):
    data = Images()
    run = trainer(tmp_path, Linear(), train_dataset=data, eval_dataset=Images(10))
    run.evaluate()
    for chosen in (data, {"train": data}):
        with pytest.raises(ArgumentRefused, match="training set"):
            run.evaluate(chosen)


def test_searching_is_refused(tmp_path):
    run = trainer(tmp_path, Linear())
    with pytest.raises(ArgumentRefused, match="trial"):
        run.train(trial={"learning_rate": 1.0})
    with pytest.raises(ArgumentRefused, match="hyperparameter_search"):
        run.hyperparameter_search()


@pytest.mark.parametrize(
    ("collate", "word"),
    [
        (lambda examples: torch.stack([e["pixel_values"] for e in examples]), "returned Tensor"),
        (lambda examples: {"pixel_values": torch.stack([e["pixel_values"] for e in examples])}, "no 'labels'"),
        (lambda examples: {"labels": [e["labels"] for e in examples]}, "'labels'.*first dimension"),
        (lambda examples: {"labels": torch.zeros(2, 1)}, "first dimension"),
    ],
)
def test_a_collator_that_hides_single_examples_is_refused(tmp_path, collate, word):
    run = trainer(tmp_path, Linear(), data_collator=collate)
    with pytest.raises(DataRefused, match=word):
        run.train()
    assert run.epsilon().upper == 0


def test_a_loss_over_the_batch_is_refused(tmp_path):
    def mean_loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels)

    run = trainer(tmp_path, tiny_vit(), compute_loss_func=mean_loss, self_check=True)
    with pytest.raises(ArgumentRefused, match=r"compute_loss_func returned \(\)"):
        run.train()
    assert run.epsilon().upper == 0


def test_smoothing_without_a_config_is_refused(tmp_path):
    with pytest.raises(ArgumentRefused, match="label_smoothing_factor"):
        trainer(tmp_path, Linear(), label_smoothing_factor=0.1)
