"""What the privacy proof needs: no example, however wild, moves the clipped sum by more than the bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import classification_loss, images, perturbed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import difference, norm, select
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hf_dpvision import clipped_gradient, clipping
from hf_dpvision.errors import MixingRefused, ModelRefused
from hf_dpvision.self_check import self_check


ROUNDING = 1e-5
WAYS = st.tuples(st.sampled_from(["auto", "mixed", "ghost", "instantiate"]), st.sampled_from([1, 2]))
BOUNDS = st.floats(1e-3, 1e3)
SINGLE = st.one_of(
    BOUNDS.map(clipping.Flat),
    st.builds(clipping.Automatic, BOUNDS, st.sampled_from([0.0, 1e-4, 0.01, 1.0])),
)
GROUPINGS = [clipping.by_layer, clipping.by_block, lambda name: name, {"": "rest", "attention": "attention"}]
GROUPED = st.builds(clipping.PerGroup, SINGLE, st.sampled_from(GROUPINGS), st.sampled_from(clipping.Shares))
STYLES = st.one_of(SINGLE, GROUPED)
STYLES_TO_POISON = [clipping.Flat(1.0), clipping.Automatic(), clipping.PerGroup(clipping.Flat(1.0))]
SCALES = st.lists(st.floats(-3.0, 4.0).map(lambda exponent: 10.0**exponent), min_size=2, max_size=5)


def small_net() -> nn.Module:
    """Convolutions, norms, attention and raw parameters; inputs of any size reach the output, no norm hides them."""
    torch.manual_seed(0)

    class SmallNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.table = nn.Parameter(torch.randn(1, 16, 8))
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.gain = nn.Parameter(torch.ones(8))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            x = torch.cat((self.token.expand(len(x), -1, -1), x + self.table), dim=1)
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0] * self.gain
            return self.head(x.mean(dim=1))

    return SmallNet()


def distance_without(model: nn.Module, batch: dict[str, Tensor], index: int, style: object, way: tuple) -> Tensor:
    """How far the clipped sum moves, as one vector, when example `index` leaves `batch`."""
    options = dict(clipping=style, norm_rule=way[0], backward_passes=way[1])
    rest = [i for i in range(len(batch["labels"])) if i != index]
    whole = clipped_gradient(model, classification_loss, batch, **options).gradients
    without = clipped_gradient(model, classification_loss, select(batch, rest), **options).gradients
    return norm({name: error.double() for name, error in difference(whole, without).items()})


@settings(max_examples=60)
@given(scales=SCALES, removed=st.integers(0, 10), style=STYLES, way=WAYS, same=st.booleans())
def test_removing_one_example_moves_the_sum_by_at_most_the_bound(
    scales: list[float], removed: int, style: object, way: tuple, same: bool
) -> None:
    batch = images(8, torch.float32, n=len(scales))
    batch["pixel_values"] *= torch.tensor(scales)[:, None, None, None]
    if same:  # duplicates add up; they must not be mistaken for one
        batch = select(batch, [0] * len(scales))
    moved = distance_without(small_net(), batch, removed % len(scales), style, way)
    # the sums themselves are rounded to float32
    assert moved <= style.sensitivity() * (1 + ROUNDING * len(scales))


def weighted_mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over positions, weighted differently for every feature, `[n]`."""
    return (model(batch["inputs"]).flatten(1, -2).mean(1) * batch["weights"]).sum(1)


class ChannelsLast(nn.Module):
    """`[n, c, h, w]` to `[n, h, w, c]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


@settings(max_examples=150)
@given(
    clip_norm=BOUNDS,
    way=WAYS,
    height=st.floats(0.0, 5.0),
    rest=st.floats(-2.0, 2.0),
    seed=st.integers(0, 1000),
    convolution=st.booleans(),
)
@example(clip_norm=0.1, way=("ghost", 1), height=3.0, rest=-0.5, seed=0, convolution=False)
@example(clip_norm=0.1, way=("auto", 1), height=4.0, rest=-0.5, seed=0, convolution=False)
@example(clip_norm=0.1, way=("ghost", 2), height=3.0, rest=-0.5, seed=0, convolution=True)
@example(clip_norm=0.1, way=("instantiate", 2), height=5.0, rest=-0.5, seed=0, convolution=False)
def test_positions_that_cancel_cannot_hide_a_gradient(
    clip_norm: float, way: tuple, height: float, rest: float, seed: int, convolution: bool
) -> None:
    """Huge activations of opposite sign leave a small gradient, whose norm a difference of huge numbers would lose."""
    torch.manual_seed(seed)
    shape = (3, 16, 4, 8) if convolution else (3, 8, 192)
    half = torch.randn(shape) * 10.0**height
    inputs = torch.cat((half, -half), dim=2 if convolution else 1) + torch.randn(1) * 10.0**rest
    if convolution:
        model = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), ChannelsLast())
    else:
        model = nn.Linear(192, 192, bias=False)
    batch = {"inputs": inputs, "weights": torch.randn(3, 32 if convolution else 192)}
    options = dict(clipping=clipping.Flat(clip_norm), norm_rule=way[0], backward_passes=way[1])
    for index in range(3):
        result = clipped_gradient(model, weighted_mean_loss, select(batch, [index]), **options)
        moved = norm({name: gradient.double() for name, gradient in result.gradients.items()})
        assert moved <= clip_norm * (1 + ROUNDING), f"claimed norm {result.norms.item()}"


@settings(max_examples=20)
@given(style=STYLES, way=WAYS, count=st.integers(1, 6))
def test_the_sum_is_at_most_the_bound_times_the_examples(style: object, way: tuple, count: int) -> None:
    model = small_net()
    batch = images(8, torch.float32, n=count)
    result = clipped_gradient(
        model, classification_loss, batch, clipping=style, norm_rule=way[0], backward_passes=way[1]
    )
    assert norm(result.gradients) <= count * style.sensitivity() * (1 + ROUNDING)
    assert torch.equal(torch.isfinite(result.norms), torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("rule", ["auto", "mixed", "ghost", "instantiate"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("style", STYLES_TO_POISON, ids=["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole_image", "one_pixel"])
def test_a_non_finite_example_contributes_zero_and_leaves_the_others_alone(
    value: float, rule: str, passes: int, style: object, whole: bool
) -> None:
    model = small_net()
    batch = images(8, torch.float32, n=4)
    batch["pixel_values"][1, :, : 8 if whole else 1, : 8 if whole else 1] = value
    options = dict(clipping=style, norm_rule=rule, backward_passes=passes)
    result = clipped_gradient(model, classification_loss, batch, **options)
    others = clipped_gradient(model, classification_loss, select(batch, [0, 2, 3]), **options)
    torch.testing.assert_close(result.norms[[0, 2, 3]], others.norms)
    if torch.isfinite(result.norms[1]):
        assert value == 1e30  # large, but it may be measured: then it is clipped like any other
        assert norm(difference(result.gradients, others.gradients)) <= style.sensitivity() * (1 + ROUNDING)
        return
    for name, gradient in others.gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("rule", ["auto", "ghost", "instantiate"])
def test_a_non_finite_loss_or_gradient_deep_inside_contributes_zero(rule: str, passes: int) -> None:
    model = perturbed(
        VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=5), torch.float32
    )
    batch = images(16, torch.float32, n=3)

    def overflowing(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        losses = classification_loss(m, b)
        return torch.where(b["labels"] == 1, losses * torch.tensor(3e38) * 1e3, losses)

    options = dict(clipping=clipping.Flat(1.0), norm_rule=rule, backward_passes=passes)
    result = clipped_gradient(model, overflowing, batch, **options)
    others = clipped_gradient(model, overflowing, select(batch, [0, 2]), **options)
    assert not torch.isfinite(result.norms[1])
    for name, gradient in others.gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_batch_norm_over_the_batch_is_refused_even_if_frozen(affine: bool, frozen: bool, tracking: bool) -> None:
    norm_layer = nn.BatchNorm2d(4, affine=affine, track_running_stats=tracking).requires_grad_(not frozen)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm_layer, nn.Flatten(), nn.Linear(144, 5)).train(tracking)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MixingRefused, match="replace_batchnorm"):
        clipped_gradient(model, classification_loss, images(8, torch.float32), clipping=clipping.Flat(1.0))
    before.pop("1.num_batches_tracked", None)  # counts batches, whatever is in them
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} was written to"


class Mixing(nn.Module):
    """One layer, around which `mix` does something across examples that the interception cannot see."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.layer = mix, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.layer, x)


@pytest.mark.parametrize(
    "mix",
    {
        "mean_subtracted": lambda layer, x: layer(x) - layer(x).mean(0, keepdim=True),
        "scaled_by_the_largest": lambda layer, x: layer(x) / layer(x).abs().amax(),
        "neighbour_added": lambda layer, x: layer(x) + layer(x).roll(1, dims=0),
        "positions_first": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
        "positions_first_flattened": lambda layer, x: (
            layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)
        ),
        "other_order": lambda layer, x: layer(x.flip(0)).flip(0),
        "attention_among_examples": lambda layer, x: nn.functional.scaled_dot_product_attention(
            *[layer(x).transpose(0, 1)] * 3
        ).transpose(0, 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_model_that_mixes_examples_is_refused_before_training(mix: tuple) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.sin(model(batch["inputs"])).sum((1, 2))

    with pytest.raises(MixingRefused):
        self_check(Mixing(mix[1]), loss, {"inputs": torch.randn(3, 6, 4)})


def test_instance_norm_that_records_the_batch_is_refused_before_training() -> None:
    """Its output treats every example alone, but its running statistics are a mean over the batch without noise."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.Linear(144, 5)
    ).train()
    with pytest.raises(ModelRefused, match="track_running_stats|running_mean"):
        self_check(model, classification_loss, images(8, torch.float32))
