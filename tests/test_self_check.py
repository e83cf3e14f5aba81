"""The self-check passes what is exact, whatever is random in it, and refuses what mixes examples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_dpvision.errors import MixingRefused, ModelRefused
from hf_dpvision.self_check import self_check


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def random_batch(n=3):
    return {"x": torch.randn(n, 6), "y": torch.arange(n) % 4}


class DropPath(nn.Module):
    def forward(self, x):
        return x * x.new_empty(len(x), 1).bernoulli_(0.7).div_(0.7) + torch.rand(len(x), 1).floor()


def test_dropout_and_stochastic_depth_do_not_disturb_the_comparison():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), DropPath(), nn.Linear(8, 4)).train()
    assert self_check(model, loss, random_batch()) < 1e-5


def test_dropout_inside_a_recurrent_layer_does_not_disturb_the_comparison():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.LSTM(2, 5, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.cells(x.view(len(x), 3, 2))[0].mean(1))

    assert self_check(Recurrent().train(), loss, random_batch()) < 1e-5


def test_the_model_and_the_global_generator_of_its_weights_stay_as_they_were():
    model = nn.Linear(6, 4)
    before = [p.clone() for p in model.parameters()]
    self_check(model, loss, random_batch())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_starts_at_zero_is_checked_too():
    class MixesBehindZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
            nn.init.zeros_(self.head.weight)

        def forward(self, x):
            return self.head(self.mixing(x - x.mean(0)))

    with pytest.raises(MixingRefused, match="mixing.weight"):
        self_check(MixesBehindZero(), loss, random_batch())


def test_examples_outside_dimension_zero_are_refused():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = nn.Linear(2, 5), nn.Linear(5, 4)

        def forward(self, x):
            steps = x.view(len(x), 3, 2).transpose(0, 1)  # [3, n, 2] with n = 3: sizes alone cannot tell
            return self.head(self.part(steps).tanh()[-1])

    with pytest.raises(MixingRefused):
        self_check(TimeFirst(), loss, random_batch(3))


def test_mixing_far_below_the_tolerance_is_refused():
    class Whispers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + 1e-9 * x.roll(1, dims=0))

    with pytest.raises(MixingRefused, match="reaches the rows of another one.*first.weight"):
        self_check(Whispers(), loss, random_batch())


def test_attention_among_examples_that_are_all_equal_is_refused():
    """Of numbers with a single feature, layer norm leaves none: what is mixed then does not differ by example."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.part, self.head = nn.LayerNorm(1), nn.Linear(1, 1), nn.Linear(6, 4)

        def forward(self, x):
            part = self.part(self.norm(x[..., None]))[..., 0]
            return self.head(x + (part @ part.t()).softmax(-1) @ part)

    with pytest.raises(MixingRefused, match="reaches the rows of another one"):
        self_check(Constant(), loss, random_batch())


def test_a_buffer_that_the_forward_pass_changes_is_refused_by_name():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x):
            self.seen += x.detach().sum(0)
            return self.head(x)

    with pytest.raises(ModelRefused, match="seen.*without noise"):
        self_check(Counts(), loss, random_batch())


def test_one_example_is_not_enough_to_see_mixing():
    with pytest.raises(ModelRefused, match="at least two"):
        self_check(nn.Linear(6, 4), loss, random_batch(1))
