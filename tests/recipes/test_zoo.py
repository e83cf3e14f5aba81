"""The committed results of all architectures are complete, are what the README says, and can be computed again."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from architectures import check as checking  # noqa: E402
from architectures import from_timm, report  # noqa: E402
from architectures.check import GROUP_NORM, Result, all_names, check, family  # noqa: E402
from architectures.reduction import Reduction, reduced  # noqa: E402
from architectures.supervise import Limits, checked  # noqa: E402


FOUND = json.loads((ROOT / "recipes" / "zoo.json").read_text())
ENTRIES = FOUND["architectures"]
# Of different operations, and fast.
SAMPLE = [
    "test_vit", "beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "resnet18",
    "aimv2_1b_patch14_224", "xcit_nano_12_p16_224", "transformers/ImageGPTForImageClassification",
    "transformers/ViTForImageClassification",
]  # fmt: skip


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_every_architecture_of_an_installed_library_has_an_entry(library: str) -> None:
    made, installed = FOUND["versions"][library], report.versions()[library]
    if made != installed:
        pytest.skip(f"made with {library} {made}, installed is {installed}, which may have others")
    here = {name for name in all_names() if (family(name) == "transformers") == (library == "transformers")}
    entries = {name for name in ENTRIES if not name.endswith(GROUP_NORM)}
    assert here == {name for name in entries if (family(name) == "transformers") == (library == "transformers")}


def test_nothing_is_wrong_and_every_refusal_is_for_a_true_reason() -> None:
    for name, entry in ENTRIES.items():
        assert entry["status"] in report.STATUSES and entry["status"] != "wrong", name
        assert entry["status"] in ("exact", "not run") or entry["reason"], name
        assert "no mixing" not in entry.get("reason", ""), name


def test_the_readme_and_the_report_count_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    inside = readme.split(report.BEGIN)[1].split(report.END)[0]
    assert inside.strip() == report.summary(FOUND)
    assert (ROOT / "recipes" / "zoo.md").read_text() == report.markdown(FOUND)
    counts = Counter(e["status"] for n, e in ENTRIES.items() if not n.endswith(GROUP_NORM))
    rows = [line.split("|")[2:-1] for line in inside.splitlines() if line.startswith(("| timm", "| transformers"))]
    totals = [sum(map(int, column)) for column in zip(*rows, strict=True)]
    assert totals == [sum(counts.values()), *(counts[status] for status in report.STATUSES)]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_computed_again_agrees(name: str) -> None:
    again = report.content([check(name)], [name])["architectures"][name]
    assert again["status"] == "exact"
    assert {key: value for key, value in ENTRIES[name].items() if key != "same_as"} == again


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = import_module("hf_dpvision.rules.linear")  # the package has a function of this name
    right = linear.bias_gradients
    monkeypatch.setattr(linear, "bias_gradients", lambda grad: right(grad * 0.999))
    result = check("test_vit")
    assert result.status == "wrong" and "bias" in result.reason


def test_examples_that_mix_are_refused_and_said_to_mix() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(x - x.mean(0))

    batch = {"x": torch.randn(3, 4).double(), "target": torch.arange(3)}
    status, reason, _ = checking._compared(Mixing().double(), batch)
    assert status == "refused" and reason.startswith("mixes examples") and "others change" in reason
    assert checking.mixed_share(nn.Linear(4, 5).double(), batch | {"input": batch.pop("x")}) == 0


def test_a_small_form_keeps_one_of_each_kind_of_block() -> None:
    stage = [{"block_type": kind, "stride": s} for kind, s in [("uir", 2), ("uir", 1), ("mqa", 1), ("uir", 1)]]
    small = reduced({"block_args": [stage], "depths": (3, 1, 9), "embed_dim": 768, "num_heads": 12}, Reduction.NARROW)
    assert [block["block_type"] for block in small["block_args"][0]] == ["uir", "mqa", "uir"]
    assert small["depths"] == (2, 1, 2) and (small["embed_dim"], small["num_heads"]) == (128, 2)


def test_only_equal_small_forms_are_one() -> None:
    form = (Reduction.NARROW, 64, 5)
    same = from_timm.fingerprint("vit_base_patch16_384", *form)
    assert from_timm.fingerprint("vit_base_patch16_224", *form) == same
    assert from_timm.fingerprint("deit3_base_patch16_224", *form) != same


def _misbehaving(name: str) -> Result:
    if name == "test_vit":
        os._exit(1)
    while name == "test_resnet":
        pass
    return Result(name, "test", "exact")


def test_a_crash_and_an_endless_loop_cost_one_architecture_each() -> None:
    known = Result("known", "test", "exact")
    names = ["test_vit", "test_resnet", "test_efficientnet", known]
    found = list(checked(names, _misbehaving, Limits(seconds=0.2, bytes=2**40)))
    assert [result.status for result in found] == ["too large", "too large", "exact", "exact"]
    assert "ended" in found[0].reason and "processor time" in found[1].reason
