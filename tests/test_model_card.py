"""The card says what the statement says, in valid front matter and in words, and nothing about the machine."""

from __future__ import annotations

import math
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from hf_dpvision.accounting import Ledger
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.model_card import CardResult, render_model_card, write_model_card
from hf_dpvision.statement import RunRecord, make_statement
from hf_dpvision.training_args import DPTrainingArguments


def _statement(tmp_path, **changes: object) -> dict:
    arguments = {
        "output_dir": str(tmp_path),
        "noise_multiplier": 1.0,
        "target_delta": 1e-5,
        "logical_batch_size": 20,
        "per_sample_max_grad_norm": 0.1,
        "use_cpu": True,
    }
    args = DPTrainingArguments(**arguments | changes)
    ledger = Ledger()
    ledger.charge(0.02, 1.0, steps=50)
    run = RunRecord(
        args=args,
        ledger=ledger,
        bounds=ledger.epsilon(1e-5),
        clipping=args.build_clipping(),
        dataset_size=1000,
        sample_rate=0.02,
        noise_multiplier=1.0,
        secret_randomness=True,
        rng="philox",
        base_model="owner/tiny-beit",
    )
    return make_statement(run, nn.Linear(3, 2))


def _front_matter(text: str) -> dict:
    return ModelCard(text).data.to_dict()


RESULTS = [
    CardResult("before fine-tuning", "accuracy", 0.1, "uoft-cs/cifar10", "test"),
    CardResult("this model", "accuracy", 0.8125, "uoft-cs/cifar10", "test", released=True),
]


def test_the_front_matter_survives_a_round_trip_with_its_numbers(tmp_path):
    statement = _statement(tmp_path)
    text = render_model_card(
        statement, model_name="tiny", datasets=["uoft-cs/cifar10"], license="apache-2.0", results=RESULTS
    )
    front = _front_matter(text)
    privacy = front["differential_privacy"]
    assert privacy == statement
    assert isinstance(privacy["guarantee"]["delta"], float) and isinstance(privacy["guarantee"]["epsilon"], float)
    assert front["base_model"] == "owner/tiny-beit" and front["datasets"] == ["uoft-cs/cifar10"]
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "image-classification"
    assert {"differential-privacy", "dp-sgd"} <= set(front["tags"])
    assert ModelCardData(**front).eval_results[0].metric_value == 0.8125
    assert len(front["model-index"][0]["results"]) == 1
    assert _front_matter(str(ModelCard(text))) == front


def test_the_text_states_the_bound_rounded_up_and_the_whole_claim(tmp_path):
    statement = _statement(tmp_path)
    statement["guarantee"]["epsilon"] = 1.00001
    text = render_model_card(statement, model_name="tiny")
    assert "epsilon at most 1.001 at delta 1e-05" in text
    assert statement["claim"] in text
    factor = float(re.search(r"by a factor of at most ([\d.]+)", text).group(1))
    assert math.exp(1.00001) <= factor <= math.exp(1.00001) + 0.1
    assert "hf-dpvision verify" in text and "What is not protected" in text


@pytest.mark.parametrize(("eval_data", "words"), [("private", "does not cover them"), ("public", "on public data")])
def test_the_card_says_whether_its_results_are_covered(tmp_path, eval_data, words):
    text = render_model_card(_statement(tmp_path, eval_data=eval_data), model_name="tiny", results=RESULTS)
    assert words in text and "| this model | uoft-cs/cifar10, test | accuracy | 0.8125 |" in text


def test_a_run_without_privacy_claims_none(tmp_path):
    text = render_model_card(_statement(tmp_path, disable_dp=True, target_delta=None), model_name="tiny")
    assert "without a privacy guarantee" in text and "What is protected" not in text
    assert "differential-privacy" not in _front_matter(text)["tags"]


def test_the_methods_used_are_cited(tmp_path):
    flat = render_model_card(_statement(tmp_path), model_name="tiny")
    automatic = render_model_card(_statement(tmp_path, clipping="automatic", backward_passes=2), model_name="tiny")
    assert "abadi2016deep" in flat and "bu2023bookkeeping" in flat and "bu2023automatic" not in flat
    assert "bu2023automatic" in automatic and "bu2023bookkeeping" not in automatic


def test_folders_of_the_machine_are_not_shown(tmp_path):
    statement = _statement(tmp_path) | {"base_model": str(tmp_path / "weights")}
    results = [CardResult("this model", "accuracy", 0.5, str(tmp_path / "pictures"), released=True)]
    text = write_model_card(
        tmp_path / "out", statement, model_name=str(tmp_path / "out"), datasets=[str(tmp_path / "pictures")],
        results=results,
    ).read_text()
    body = text.split("---", 2)[2]
    assert str(tmp_path) not in body
    assert "`weights`" in body and "# out" in body and "Fine-tuned on: pictures." in body
    front = _front_matter(text)
    assert "datasets" not in front and "base_model" not in front


def test_training_settings_are_listed(tmp_path):
    text = render_model_card(_statement(tmp_path), model_name="tiny", training={"learning rate": 0.5, "a|b": "c"})
    assert "| learning rate | 0.5 |" in text and "| a\\|b | c |" in text


def test_an_incomplete_statement_is_refused(tmp_path):
    statement = _statement(tmp_path)
    del statement["sampling"]
    with pytest.raises(ArgumentRefused, match="'sampling'"):
        render_model_card(statement, model_name="tiny")
