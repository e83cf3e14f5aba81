"""The privacy arguments: what must be given, what is refused, what never reaches a file."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from trainer_cases import arguments
from transformers import HfArgumentParser

from hf_dpvision import DPTrainingArguments
from hf_dpvision.clipping import Automatic, Flat
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.rules.cost import NormRule


OWN = (
    "target_epsilon", "noise_multiplier", "target_delta", "per_sample_max_grad_norm", "logical_batch_size", "clipping",
    "norm_rule", "backward_passes", "memory_bound", "accountant", "eval_data", "privacy_unit", "privacy_unit_column",
    "examples_per_unit", "id_column", "disable_dp", "self_check", "group_clipping", "clipping_groups",
    "clipping_shares",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_epsilon": 3.0}, "target_epsilon noise_multiplier exactly one"),
        ({"noise_multiplier": None}, "target_epsilon noise_multiplier exactly one"),
        ({"noise_multiplier": None, "target_epsilon": 0.0}, "target_epsilon=0.0 positive"),
        ({"noise_multiplier": None, "target_epsilon": -1.0}, "target_epsilon=-1.0 positive"),
        ({"noise_multiplier": None, "target_epsilon": float("inf")}, "target_epsilon=inf disable_dp"),
        ({"noise_multiplier": None, "target_epsilon": float("nan")}, "target_epsilon=nan"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0 disable_dp"),
        ({"noise_multiplier": -0.5}, "noise_multiplier=-0.5"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier=nan"),
        ({"target_delta": None}, "target_delta=None given"),
        ({"target_delta": 0.0}, "target_delta=0.0"),
        ({"target_delta": 1.0}, "target_delta=1.0"),
        ({"target_delta": 0.6}, "target_delta=0.6"),
        ({"target_delta": 1e-13}, "target_delta=1e-13"),
        ({"target_delta": "1e-5"}, "target_delta='1e-5' YAML"),
        ({"logical_batch_size": None}, "logical_batch_size=None given"),
        ({"logical_batch_size": 0}, "logical_batch_size=0"),
        ({"logical_batch_size": 2.5}, "logical_batch_size=2.5 whole"),
        ({"logical_batch_size": True}, "logical_batch_size=True"),
        ({"per_sample_max_grad_norm": 0.0}, "max_norm=0.0"),
        ({"per_sample_max_grad_norm": float("nan")}, "max_norm=nan"),
        ({"clipping": "Flat"}, "clipping='Flat' 'flat' 'automatic'"),
        ({"memory_bound": 0.0}, "memory_bound=0.0 positive"),
        ({"memory_bound": float("nan")}, "memory_bound=nan"),
        ({"norm_rule": "best"}, "norm_rule='best' 'ghost'"),
        ({"backward_passes": 3}, "backward_passes=3"),
        ({"accountant": "gdp"}, "accountant='gdp' 'prv'"),
        ({"eval_data": "secret"}, "eval_data='secret' 'public'"),
        ({"privacy_unit": "user"}, "privacy_unit='user' 'example'"),
        ({"label_names": ["labels", "more"]}, "label_names exactly one"),
    ],
)
def test_a_wrong_privacy_argument_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(ArgumentRefused) as refusal:
        arguments(tmp_path, **changes)
    for word in words.split():
        assert word in str(refusal.value)


def test_an_unknown_argument_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match="max_grad_nrom"):
        arguments(tmp_path, max_grad_nrom=0.1)


def test_the_baseline_needs_no_budget(tmp_path):
    args = arguments(tmp_path, disable_dp=True, noise_multiplier=None, target_delta=None)
    assert args.target_epsilon is None


def test_strings_become_objects(tmp_path):
    args = arguments(tmp_path, per_sample_max_grad_norm=0.5, norm_rule="ghost")
    assert args.build_clipping() == Flat(0.5) and args.norm_rule is NormRule.GHOST
    automatic = arguments(tmp_path, per_sample_max_grad_norm=0.5, clipping="automatic").build_clipping()
    assert automatic == Automatic(max_norm=0.5) and automatic.sensitivity() == 0.5


def test_every_own_argument_explains_itself():
    fields = {field.name: field for field in dataclasses.fields(DPTrainingArguments)}
    assert all(len(fields[name].metadata["help"]) > 10 for name in OWN)


def test_defaults_fit_private_training(tmp_path):
    args = DPTrainingArguments(
        output_dir=str(tmp_path), target_epsilon=3.0, target_delta=1e-5, logical_batch_size=10, use_cpu=True
    )
    assert args.max_grad_norm == 0 and args.remove_unused_columns is False and args.label_names == ["labels"]
    assert args.logging_steps == 10 and args.average_tokens_across_devices is False and args.eval_data == "private"


def test_arguments_can_be_given_on_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --target_epsilon 3 --target_delta 1e-5 --logical_batch_size 100 --use_cpu True"
    (args,) = HfArgumentParser(DPTrainingArguments).parse_args_into_dataclasses(
        [*line.split(), "--clipping", "automatic", "--norm_rule", "mixed", "--disable_dp", "False"]
    )
    assert (args.target_epsilon, args.target_delta, args.logical_batch_size) == (3.0, 1e-5, 100)
    assert args.norm_rule is NormRule.MIXED and isinstance(args.build_clipping(), Automatic)


def test_the_hub_token_stays_in_memory(tmp_path):
    args = arguments(tmp_path, hub_token="planted-token")
    file = io.BytesIO()
    torch.save(args, file)
    assert b"planted-token" not in file.getvalue()
    assert "planted-token" not in args.to_json_string()
    assert args.hub_token == "planted-token"
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert loaded.hub_token is None and loaded.target_delta == args.target_delta
