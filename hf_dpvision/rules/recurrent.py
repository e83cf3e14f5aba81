"""Recurrent layers, step by step: what enters each step and what is carried on meet the weights in linear uses.

The framework's own function is one operation over all steps, and would need a backward pass for every example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .generic import generic


# From what a step's input and its state were turned into, and the state: the next state. The first is the output.
Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _lstm_step(entering: Tensor, carried: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    take, keep, new, show = (entering + carried).chunk(4, dim=-1)
    cell = keep.sigmoid() * state[1] + take.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru_step(entering: Tensor, carried: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (reset, keep, new), (old_reset, old_keep, old_new) = entering.chunk(3, dim=-1), carried.chunk(3, dim=-1)
    new = (new + (reset + old_reset).sigmoid() * old_new).tanh()
    return (new + (keep + old_keep).sigmoid() * (state[0] - new),)


def _tanh_step(entering: Tensor, carried: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((entering + carried).tanh(),)


def _relu_step(entering: Tensor, carried: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((entering + carried).relu(),)


STEPS: dict[str, Step] = {
    "lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _tanh_step, "rnn_relu": _relu_step,
}  # fmt: skip


def recurrent(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """The rule for `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`."""

    def rule(
        call: Any, input: Tensor, hx: Any, params: Any, has_biases: bool, num_layers: Any, dropout: Any = 0.0,
        train: bool = False, bidirectional: bool = False, batch_first: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        if isinstance(has_biases, (list, tuple)):  # packed: another argument comes second
            call.refuse("a packed sequence holds the first steps of all examples, then the second, and so on")
        if not call.batched(input):
            return generic(call, *call.args, **call.kwargs)
        weights, directions = _by_layer(params, num_layers * (1 + bidirectional)), 1 + bidirectional
        with call.intercepted():
            x = input if batch_first else input.transpose(0, 1)
            call.check_rows(x)
            last = []
            for layer in range(num_layers):
                if layer and train and dropout > 0:
                    x = F.dropout(x, dropout)
                outputs = []
                for direction in range(directions):
                    place = layer * directions + direction
                    start = tuple(call.following(state[place], x) for state in states)
                    sequence, end = _run(step, x, start, weights[place], has_biases, backwards=direction == 1)
                    outputs.append(sequence)
                    last.append(end)
                x = torch.cat(outputs, dim=-1)
            ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
            return x if batch_first else x.transpose(0, 1), *ends

    return rule


def recurrent_cell(step: Step) -> Callable[..., Any]:
    """The rule for one step: `torch.lstm_cell`, `torch.gru_cell`, `torch.rnn_tanh_cell` or `torch.rnn_relu_cell`."""

    def rule(
        call: Any, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:  # fmt: skip
        states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        if not call.batched(input):
            return generic(call, *call.args, **call.kwargs)
        with call.intercepted():
            states = tuple(call.following(state, input) for state in states)
            found = step(F.linear(input, w_ih, b_ih), F.linear(states[0], w_hh, b_hh), states)
        return found if isinstance(hx, (list, tuple)) else found[0]

    return rule


def _by_layer(params: Sequence[Tensor], layers: int) -> list[Sequence[Tensor]]:
    """The weights of every layer and direction: of the input, of the state, biases, of a projection."""
    each = len(params) // layers
    return [params[i * each : (i + 1) * each] for i in range(layers)]


def _run(
    step: Step, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All steps of one layer in one direction over `x [n*k, t, d]`: the outputs `[n*k, t, h]` and the last state."""
    input_bias, state_bias = weights[2:4] if has_biases else (None, None)
    projection = weights[4 if has_biases else 2 :]
    entering = F.linear(x, weights[0], input_bias)
    outputs: list[Tensor] = []
    for position in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        state = step(entering[:, position], F.linear(state[0], weights[1], state_bias), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, dim=1), state
