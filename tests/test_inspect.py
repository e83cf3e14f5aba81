"""The plan that `hf-dpvision inspect` prints."""

import timm
import torch
from torch import nn

from hf_dpvision.inspect import format_plan, format_price, inspect_model, measure_model, plan
from hf_dpvision.rules.cost import NormRule


# Positions, inputs, outputs and choice per layer of VGG-11 at 224 pixels, by the rule of Bu, Mao, Xu 2022
# (arXiv:2205.10683, section 4): ghost if 2 t^2 < p d.
VGG11 = [
    (50176, 27, 64, "keep"),
    (12544, 576, 128, "keep"),
    (3136, 1152, 256, "keep"),
    (3136, 2304, 256, "keep"),
    (784, 2304, 512, "keep"),
    (784, 4608, 512, "ghost"),
    (196, 4608, 512, "ghost"),
    (196, 4608, 512, "ghost"),
    (1, 25088, 4096, "ghost"),
    (1, 4096, 4096, "ghost"),
    (1, 4096, 1000, "ghost"),
]


def test_vgg11_reproduces_the_papers_decision_table():
    model = timm.create_model("vgg11", num_classes=1000).eval()
    rows = plan(model, (torch.zeros(1, 3, 224, 224),), 1, NormRule.MIXED)
    affine = [row for row in rows if row.positions is not None]
    assert [(row.positions, row.inputs, row.outputs, row.choice) for row in affine] == VGG11
    assert f"{sum(row.extra_memory for row in affine):.3g}" == "3.52e+06"


def test_inspecting_vgg11_shows_the_papers_choices_and_totals_beside_the_plan():
    rows = inspect_model("timm/vgg11", 224, "auto")
    affine = [row for row in rows if row.positions is not None]
    choices = ["ghost" if choice == "ghost" else "instantiate" for *_, choice in VGG11]
    assert [row.paper for row in affine] == choices
    text = format_plan(rows)
    assert "all ghost 5.39e+09, all instantiated 1.33e+08, by the paper's rule 3.52e+06" in text


def test_an_operation_without_a_rule_is_named_in_the_plan():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return torch.cdist(x, self.weight)

    text = format_plan(plan(Odd(), (torch.zeros(1, 4),), 1, NormRule.AUTO))
    assert "cdist (generic: slow)" in text


def test_measuring_a_model_reports_both_steps():
    price = measure_model("timm/test_vit", 160, "auto", n=2)
    assert min(price.seconds) > 0 and min(price.peak_bytes) > 0
    text = format_price(price)
    assert f"{price.seconds[1]:.3f} s with it" in text and "MiB without privacy" in text
