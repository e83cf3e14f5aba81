"""Clipping group by group equals its definition, bounds every example by C in total, and says what it did."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cases import CASES, classification_loss, images, perturbed
from reference import clip_groups_and_sum, mismatch, norm, per_example_gradients, select
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import Images, Linear, arguments, tiny_vit, trainer

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.clipping import Automatic, ByPrefix, Flat, Groups, PerGroup, Shares, by_block, by_layer
from hf_dpvision.errors import ArgumentRefused, ModelRefused
from hf_dpvision.exact_sums import Grid
from hf_dpvision.model_card import write_model_card
from hf_dpvision.self_check import self_check
from hf_dpvision.statement import write_statement
from hf_dpvision.verify.card import compare_card
from hf_dpvision.verify.consistency import inconsistencies
from hf_dpvision.verify.schema import read_statement
from hf_dpvision.wording import plain_statement


BOUND = 2.0  # some groups of some examples are longer than their part of it, and some are not
GROUPINGS = {"layer": by_layer, "block": by_block, "parameter": lambda name: name, "halves": lambda name: name[-1]}
WAYS = [("ghost", 1), ("instantiate", 1), ("mixed", 2)]


class TiedWeights(nn.Module):
    """One weight used by two layers, one table by both, and a weight that is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.table = nn.Parameter(torch.randn(16, 8))
        self.left, self.right = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.table
        x = x + torch.tanh(self.first(x))
        x = x + torch.tanh(self.second(x)) + self.table
        return F.linear(x.mean(1), torch.cat((self.left, self.right.cos())))


def tied() -> nn.Module:
    torch.manual_seed(0)
    return TiedWeights()


MODELS = {case.name: case.build for case in CASES} | {"tied": tied}


def written_out(style: Flat | Automatic, group_of: dict[str, str], sizes: dict[str, int], shares: Shares) -> dict:
    """The bound of each group, from the definition."""
    groups = sorted(set(group_of.values()))
    if shares is Shares.EQUAL:
        return {group: style.max_norm / len(groups) ** 0.5 for group in groups}
    total = sum(sizes.values())
    held = {group: sum(size for name, size in sizes.items() if group_of[name] == group) for group in groups}
    return {group: style.max_norm * (size / total) ** 0.5 for group, size in held.items()}


@pytest.mark.parametrize("name", ["transformers_vit", "beit", "resnet_group_norm", "resnetv2_bit", "tied"])
def test_sums_equal_a_loop_that_clips_every_group_of_every_example(name: str) -> None:
    model = perturbed(MODELS[name](), torch.float64)
    batch = images(32, torch.float64)
    gradients = per_example_gradients(model, classification_loss, batch)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    failures = []
    for number, (kind, grouping) in enumerate(GROUPINGS.items()):
        style, shares = (Flat(BOUND), Automatic(BOUND))[number % 2], list(Shares)[number // 2]
        group_of = {name: grouping(name) for name in sizes}
        truth = clip_groups_and_sum(
            gradients, group_of, written_out(style, group_of, sizes, shares), getattr(style, "gamma", None)
        )
        for rule, passes in WAYS:
            found = clipped_gradient(
                model, classification_loss, batch, clipping=PerGroup(style, grouping, shares), norm_rule=rule,
                backward_passes=passes,
            )  # fmt: skip
            if wrong := mismatch(found.norms, found.gradients, truth, tolerance=1e-10, own=1e-7):
                failures.append(f"{kind}, {style}, {rule}, {passes}: {wrong}")
    assert not failures, "\n".join(failures)


def test_one_group_is_the_style_itself() -> None:
    model, batch = perturbed(MODELS["transformers_vit"](), torch.float32), images(32, torch.float32)
    for style in (Flat(0.7), Automatic(0.7)):
        plain = clipped_gradient(model, classification_loss, batch, clipping=style)
        grouped = clipped_gradient(model, classification_loss, batch, clipping=PerGroup(style, lambda name: "all"))
        assert torch.equal(plain.norms, grouped.norms)
        assert all(torch.equal(plain.gradients[name], grouped.gradients[name]) for name in plain.gradients)


def test_views_of_one_image_are_averaged_before_their_groups_are_clipped() -> None:
    model = perturbed(MODELS["transformers_vit"](), torch.float64)
    views = {name: value.repeat_interleave(2, 0) for name, value in images(32, torch.float64).items()}
    views["pixel_values"][1::2] *= -0.5

    def mean_over_views(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return classification_loss(m, batch).unflatten(0, (-1, 2)).mean(1)

    style = PerGroup(Flat(0.1), by_block)
    found = clipped_gradient(model, mean_over_views, views, clipping=style, rows=2)
    total = {name: torch.zeros_like(value) for name, value in found.gradients.items()}
    for first in range(0, 6, 2):
        own = select(views, [first, first + 1])
        (one,) = [clipped_gradient(model, mean_over_views, own, clipping=style, rows=2)]
        raw = torch.autograd.grad(mean_over_views(model, own).sum(), list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        for group in {by_block(name) for name in names}:
            members = {name: value for name, value in zip(names, raw, strict=True) if by_block(name) == group}
            bound = style.over(dict.fromkeys(names, 1)).bounds()[group]
            factor = min(1.0, bound / norm(members).item())
            for name, value in members.items():
                total[name] += factor * value
                torch.testing.assert_close(one.gradients[name], factor * value, rtol=1e-9, atol=1e-12)
    for name, value in total.items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-9, atol=1e-12)


def test_a_norm_that_is_not_finite_in_one_group_silences_the_example_in_all() -> None:
    groups = PerGroup(Flat(1.0), by_layer).over({"a.weight": 4, "b.weight": 4, "c.weight": 4})
    squared = torch.tensor([[1.0, 4.0, 9.0], [1.0, float("inf"), 0.0], [0.0, 0.0, float("nan")], [3e38, 3e38, 1.0]])
    factors = groups.factors(squared)
    assert torch.equal(factors[1:], torch.zeros(3, 3))  # the last one's total is beyond float32
    torch.testing.assert_close(factors[0], torch.tensor([1.0, 1 / 2, 1 / 3]) / math.sqrt(3))


def test_exact_sums_of_grouped_gradients_do_not_depend_on_the_order() -> None:
    """The grid is that of C, which bounds every entry of every group."""
    model, batch = perturbed(MODELS["transformers_vit"](), torch.float32), images(32, torch.float32, n=6)
    style = PerGroup(Flat(1.0), by_layer)
    grid = Grid(6, style.sensitivity(), sum(parameter.numel() for parameter in model.parameters()))
    parts = [
        grid.rounded(clipped_gradient(model, classification_loss, select(batch, [i]), clipping=style).gradients)
        for i in range(6)
    ]
    for name in parts[0]:
        forwards = sum((part[name] for part in parts), torch.zeros_like(parts[0][name]))
        halves = sum(part[name] for part in parts[3:]) + sum(part[name] for part in reversed(parts[:3]))
        assert torch.equal(forwards, halves)


@pytest.mark.parametrize("shares", list(Shares))
@pytest.mark.parametrize("grouping", [by_layer, by_block, {"": "rest", "vit.layers.0": "first", "classifier": "head"}])
def test_the_squares_of_the_bounds_add_up_to_that_of_the_sensitivity(shares: Shares, grouping: object) -> None:
    sizes = {name: parameter.numel() for name, parameter in tiny_vit().named_parameters()}
    style = PerGroup(Flat(0.3), grouping, shares)
    groups = style.over(sizes)
    assert math.isclose(math.hypot(*groups.bounds().values()), style.sensitivity(), rel_tol=1e-12)
    assert set(groups.columns) == set(sizes) and set(groups.columns.values()) == set(range(len(groups.names)))


def test_layers_and_blocks_are_read_off_the_names() -> None:
    assert by_layer("timm_model.blocks.3.attn.qkv.weight") == "timm_model.blocks.3.attn.qkv"
    assert by_layer("cls_token") == "(of the model itself)"
    assert by_block("timm_model.blocks.3.attn.q_bias") == "timm_model.blocks.3"
    assert by_block("encoder.stages.1.layers.2.conv.weight") == "encoder.stages.1.layers.2"
    assert by_block("vit.layernorm.weight") == "vit.layernorm"
    assert ByPrefix({"vit": "late", "vit.layers.1": "early"})("vit.layers.1.norm.bias") == "early"
    assert ByPrefix({"vit": "late", "vit.layers.1": "early"})("vit.layers.10.norm.bias") == "late"


@dataclass(frozen=True)
class Undivided(PerGroup):
    """A fault: every group is clipped to C, not to its part of it."""

    def over(self, sizes: dict[str, int]) -> Groups:
        groups = super().over(sizes)
        return replace(groups, styles=(self.style,) * len(groups.styles))


def test_a_bound_that_is_not_divided_among_the_groups_is_refused_before_training() -> None:
    batch = images(32, torch.float32)
    model = perturbed(MODELS["transformers_vit"](), torch.float32)
    assert self_check(model, classification_loss, batch, clipping=PerGroup(Flat(1.0), by_block)) < 1e-4
    with pytest.raises(ModelRefused, match="Undivided: .* where 1 is stated"):
        self_check(model, classification_loss, batch, clipping=Undivided(Flat(1.0), by_block))
    alone = clipped_gradient(model, classification_loss, select(batch, [0]), clipping=Undivided(Flat(0.01), by_block))
    assert norm(alone.gradients) > 0.015  # and it does break the bound


def stated(folder: Path, **changes: object) -> dict:
    """The statement of a run, written with its card."""
    run = trainer(folder, tiny_vit(), seed=None, max_steps=2, self_check=True, **changes)
    run.train()
    statement = run.privacy_statement()
    write_statement(folder, statement)
    write_model_card(folder, statement, model_name="tiny")
    return statement


def flaws(folder: Path) -> list[str]:
    """Fields of the statement and of its card that verification names; epsilon is not computed again."""
    statement, findings = read_statement(folder / "privacy.json", "privacy.json")
    if statement is not None:
        findings = [*inconsistencies(statement, "privacy.json"), *compare_card(folder, statement)]
    return [finding.field for finding in findings]


@pytest.mark.parametrize(
    ("changes", "granularity", "groups"),
    [
        ({"clipping": "per_layer"}, "layer", 2 * 8 + 4),
        ({"clipping": "per_block", "group_clipping": "automatic", "clipping_shares": "size"}, "block", 2 + 4),
        ({"clipping": "per_group", "clipping_groups": '{"vit": "body", "": "rest"}'}, "group", 2),
    ],
)
def test_a_run_states_its_groups_and_is_verified(tmp_path, changes, granularity, groups):
    statement = stated(tmp_path, per_sample_max_grad_norm=0.5, **changes)
    said = statement["clipping"]
    assert said["granularity"] == granularity and len(said["groups"]) == groups
    assert said["function"] == changes.get("group_clipping", "flat") and said["sensitivity"] == 0.5
    assert statement["noise"]["std"] == 0.5  # of noise multiplier 1: that of C, whatever the groups
    words = plain_statement(statement)
    assert f"of each of {groups} groups of trained parameters (by " in words
    assert "all trained parameters together" not in words
    card = (tmp_path / "README.md").read_text()
    assert f"{groups} groups of trained parameters" in card and "he2023exploring" in card
    assert flaws(tmp_path) == []


def test_verify_names_bounds_of_groups_that_do_not_add_up(tmp_path):
    statement = stated(tmp_path, clipping="per_block")
    statement["clipping"]["groups"] = dict.fromkeys(statement["clipping"]["groups"], 1.0)  # C per group, not divided
    (tmp_path / "privacy.json").write_text(json.dumps(statement))
    assert "clipping.groups" in flaws(tmp_path)
    del statement["clipping"]["groups"]
    (tmp_path / "privacy.json").write_text(json.dumps(statement))
    assert "clipping" in flaws(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clipping": "per_group"}, "clipping_groups"),
        ({"clipping": "flat", "clipping_groups": {"": "all"}}, "clipping_groups 'per_group'"),
        ({"clipping": "per_group", "clipping_groups": "early"}, "JSON"),
        ({"clipping": "per_group", "clipping_groups": {}}, "clipping_groups mapping"),
        ({"clipping": "flat", "group_clipping": "automatic"}, "group_clipping no effect"),
        ({"clipping": "automatic", "clipping_shares": "size"}, "clipping_shares no effect"),
        ({"clipping": "per_layer", "clipping_shares": "large"}, "clipping_shares 'equal'"),
        ({"clipping": "layerwise"}, "clipping 'per_layer'"),
    ],
)
def test_groups_that_contradict_the_clipping_are_refused(tmp_path, changes, words):
    with pytest.raises(ArgumentRefused) as refusal:
        arguments(tmp_path, **changes)
    assert all(word in str(refusal.value) for word in words.split())


def test_a_parameter_without_a_group_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, tiny_vit(), clipping="per_group", clipping_groups={"vit": "body"})
    with pytest.raises(ArgumentRefused, match="classifier.weight"):
        run.train()
    assert not (tmp_path / "privacy").exists()


def test_a_run_is_not_resumed_with_other_groups(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, Linear(), clipping="per_layer", **saving).train()
    others = [("per_block", "flat"), ("flat", "flat"), ("per_layer", "automatic")]
    for groups, within in others:
        run = trainer(tmp_path, Linear(), clipping=groups, group_clipping=within, **saving | {"max_steps": 6})
        with pytest.raises(ArgumentRefused, match="clipping: .* now, {'groups': 'per_layer'"):
            run.train(resume_from_checkpoint=True)


def test_the_trainer_clips_by_group(tmp_path):
    """Without noise, an epoch of everyone is the mean of what a loop clips group by group."""
    dataset, model = Images(8, torch.float64), tiny_vit().double()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = dataset.batch(list(range(8)))

    def losses(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(m(b["pixel_values"]).logits, b["labels"], reduction="none")

    gradients = per_example_gradients(model, losses, batch)
    group_of = {name: by_layer(name) for name in gradients[0]}
    bounds = dict.fromkeys(group_of.values(), 0.1 / len(set(group_of.values())) ** 0.5)
    truth = clip_groups_and_sum(gradients, group_of, bounds, None).gradients
    trainer(
        tmp_path, model, train_dataset=dataset, clipping="per_layer", per_sample_max_grad_norm=0.1, max_steps=1,
        logical_batch_size=8, noise_multiplier=1e-9, learning_rate=1.0, target_delta=1e-3,
    ).train()  # fmt: skip
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] - parameter, truth[name] / 8, rtol=1e-5, atol=1e-8)
    assert clipping.PerGroup is PerGroup
