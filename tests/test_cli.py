"""The console script answers with numbers and a claim, or with one line on standard error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hf_dpvision import accounting, cli


RUN = ["--sample-rate", "0.02", "--noise-multiplier", "1.0", "--steps", "250", "--delta", "1e-5"]
BUDGET = ["--target-epsilon", "3", "--delta", "1e-5"]


def test_epsilon_prints_the_bounds_the_accountant_and_the_claim(capsys):
    assert cli.main(["epsilon", *RUN]) == 0
    out = capsys.readouterr().out
    for part in ("lower       2.0221", "estimate    2.0324", "upper       2.0426", "accountant  prv", "Not covered"):
        assert part in out, part


def test_epsilon_as_json_equals_the_library(capsys):
    assert cli.main(["epsilon", *RUN, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    bounds = accounting.epsilon(sample_rate=0.02, noise_multiplier=1.0, steps=250, delta=1e-5)
    assert report["epsilon"] == json.loads(json.dumps(bounds.to_dict()))
    assert report["claim"].startswith("(2.0426, 1e-05)")


def test_infinite_epsilon_is_valid_json(capsys):
    assert cli.main(["epsilon", "--sample-rate", "0.1", "--noise-multiplier", "0", "--steps", "1", "--delta", "1e-5",
                     "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["epsilon"]["upper"] == "inf"


def test_calibrate_keeps_the_budget(capsys):
    assert cli.main(["calibrate", *BUDGET, "--sample-rate", "0.02", "--steps", "250", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 2.97 < report["epsilon"]["upper"] <= 3.0
    assert report["noise_multiplier"] == pytest.approx(0.853, abs=0.001)


@pytest.mark.parametrize(
    ("options", "rate", "steps"),
    [
        (["--dataset-size", "50000", "--logical-batch-size", "1000", "--epochs", "5"], 0.02, 250),
        (["--dataset-size", "1437", "--logical-batch-size", "100", "--epochs", "1.5"], 100 / 1437, 23),
        (["--sample-rate", "0.07", "--epochs", "2"], 0.07, 30),
        (["--sample-rate", "0.02", "--epochs", "1"], 0.02, 50),
        (["--sample-rate", "0.02", "--dataset-size", "50000", "--steps", "7"], 0.02, 7),
    ],
)
def test_sampling_and_length_can_be_given_in_examples_and_epochs(capsys, options, rate, steps):
    command = ["epsilon", "--noise-multiplier", "2", "--delta", "1e-5", "--accountant", "rdp", "--json", *options]
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["sample_rate"], report["steps"]) == (rate, steps)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["epsilon", *RUN, "--sample-rate", "2"], "not a probability"),
        (["epsilon", *RUN, "--delta", "0"], "delta=0"),
        (["epsilon", *RUN, "--delta", "nan"], "delta=nan"),
        (["epsilon", *RUN, "--noise-multiplier", "-1"], "noise_multiplier=-1"),
        (["epsilon", *RUN, "--steps", "-1"], "steps=-1"),
        (["epsilon", *RUN, "--accountant", "gdp"], "central-limit"),
        (["epsilon", *RUN, "--logical-batch-size", "10"], "both set the sampling"),
        (["epsilon", *RUN, "--dataset-size", "0"], "at least one image"),
        (["calibrate", *BUDGET, "--steps", "5", "--dataset-size", "10"], "not determined"),
        (["calibrate", *BUDGET, "--steps", "5", "--dataset-size", "10", "--logical-batch-size", "11"], "not between"),
        (["calibrate", *BUDGET, "--epochs", "-2", "--sample-rate", "0.1"], "no number of steps"),
        (["calibrate", *BUDGET, "--epochs", "inf", "--sample-rate", "0.1"], "no number of steps"),
        (["calibrate", *BUDGET, "--steps", "5", "--sample-rate", "0.1", "--target-epsilon", "0"], "positive"),
        (["inspect", "timm/vgg11", "--image-size", "0"], "one pixel"),
    ],
)
def test_wrong_values_end_with_code_2_and_one_line(capsys, command, message):
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith(f"hf-dpvision {command[0]}: ") and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "command",
    [[], ["unknown"], ["epsilon"], ["epsilon", *RUN, "--steps", "2.5"], ["epsilon", *RUN, "--epochs", "1"],
     ["epsilon", *RUN, "--eps-max", "1"], ["inspect", "timm/vgg11", "--norm-rule", "fast"]],
)  # fmt: skip
def test_a_malformed_command_line_ends_with_code_2(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_units_are_claimed_as_units(capsys):
    sizes = ["--dataset-size", "400", "--logical-batch-size", "20", "--steps", "5", "--noise-multiplier", "2"]
    command = ["epsilon", *sizes, "--delta", "1e-5", "--accountant", "rdp"]
    assert cli.main(command) == 0
    assert "name the column by --privacy-unit-column" in capsys.readouterr().out
    assert cli.main([*command, "--privacy-unit-column", "patient"]) == 0
    told = capsys.readouterr().out
    assert "one training image" not in told and "--privacy-unit-column" not in told
    assert "column 'patient', taken together; at most 4" in told and "number of units, N = 400, is public" in told
    for wrong in (["--examples-per-unit", "2"], ["--privacy-unit-column", "patient", "--examples-per-unit", "0"]):
        assert cli.main([*command, *wrong]) == 2
        assert capsys.readouterr().err.startswith("hf-dpvision epsilon: --examples-per-unit")


def test_accounting_commands_do_not_load_model_libraries():
    script = (
        "import sys; from hf_dpvision import cli; cli.main(['epsilon', *sys.argv[1:]]);"
        "print([name for name in ('torch', 'transformers', 'timm', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, *RUN], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_inspect_prints_the_plan_and_its_json(capsys):
    command = ["inspect", "timm/resnet10t", "--image-size", "32", "--norm-rule", "mixed"]
    assert cli.main(command) == 0
    assert "ghost" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"parameter", "operation", "choice"} <= set(report["uses"][0])
    assert (report["model"], report["image_size"], report["norm_rule"]) == ("timm/resnet10t", 32, "mixed")
    assert report["measured"] is None
    assert cli.main([*command, "--json", "--measure"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert set(measured) == {"seconds", "peak_bytes"} and all(value > 0 for value in measured["seconds"])


def test_inspect_of_an_unknown_model_ends_with_code_1(capsys):
    assert cli.main(["inspect", "timm/no_such_model"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
