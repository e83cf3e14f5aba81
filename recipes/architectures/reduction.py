"""Fewer blocks and narrower layers: the construction arguments of an architecture, made smaller by their names.

What makes an architecture what it is stays: kinds of blocks, normalisation, activations, attention and its heads'
width, position embeddings, pooling, number of stages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import partial, reduce
from math import gcd
from typing import Any

from torch import nn


# How many blocks there are, or how many in each stage.
DEPTHS = frozenset(
    "depth depths depth_list layers num_blocks num_blocks_list block_config serial_depths parallel_depth k_sec "
    "block_per_stage d num_hidden_layers n_layer num_self_attends_per_block num_modules cls_depth transformer_depths"
    .split()
)  # fmt: skip
# Lists of one list of blocks per stage.
BLOCKS = frozenset({"block_args", "cfgs"})
HEADS = frozenset(
    "num_heads num_attention_heads heads num_kv_heads num_key_value_heads attn_pool_num_heads n_head".split()
)
WIDTHS = frozenset(
    "embed_dim embed_dims dims channels widths width_list base_dims hidden_size hidden_sizes neck_hidden_sizes "
    "intermediate_size n_embd dim growth_rates num_init_features".split()
)
# Random dropping, which a comparison has to leave out, and initial values, which are perturbed.
DROPPED = frozenset("drop_path_rate drop_rate attn_drop_rate proj_drop_rate pos_drop_rate patch_drop_rate".split())
INITIAL = frozenset("init_values ls_init_value layer_scale_init_value layerscale_value layer_scale".split())
# What is set to no more than this where an architecture is narrowed: layers before the head, channels of a group.
MOST = {"num_features": 256, "group_size": 8}
BLOCKS_KEPT = 2
HEADS_KEPT = 2
# No width is divided to less than this.
NARROWEST = 16
LEAST_MULTIPLIER = 0.5


class Reduction(Enum):
    """How far an architecture is reduced; each of these is tried where the one before cannot be built or run."""

    NARROW = "fewer blocks, narrower"
    SHALLOW = "fewer blocks"
    NONE = "as it is"


def reduced(arguments: Mapping[str, Any], reduction: Reduction) -> dict[str, Any]:
    """The arguments with fewer blocks, and narrower where `reduction` says so; unknown names stay."""
    if reduction is Reduction.NONE:
        return dict(arguments)
    arguments = _fewer_entries(arguments)
    for name, value in arguments.items():
        if name in DEPTHS or name == "stages" and all(map(_is_size, _leaves(value))):
            arguments[name] = _capped(value, BLOCKS_KEPT)
        elif name in DROPPED | INITIAL and isinstance(value, float):
            arguments[name] = 0.0 if name in DROPPED else 1e-4
        elif name in MOST and reduction is Reduction.NARROW:
            arguments[name] = _capped(value, MOST[name])
        elif name in BLOCKS and isinstance(value, (list, tuple)):
            arguments[name] = [_one_of_each(stage) for stage in value]
        elif isinstance(value, Mapping):
            arguments[name] = type(value)(reduced(value, reduction))
        elif is_dataclass(value) and not isinstance(value, type):
            arguments[name] = _reduced_dataclass(value, reduction)
        elif isinstance(value, (list, tuple)) and value and any(map(is_dataclass, _leaves(value))):
            arguments[name] = _each(value, lambda item: _reduced_dataclass(item, reduction))
    return _narrowed(arguments) if reduction is Reduction.NARROW else arguments


def _fewer_entries(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is said block by block, the first and the middle one, where all blocks become two."""
    depth = arguments.get("depth")
    if not _is_size(depth) or depth <= BLOCKS_KEPT:
        return dict(arguments)
    by_block = {n: v for n, v in arguments.items() if isinstance(v, (list, tuple)) and len(v) == depth}
    return dict(arguments) | {name: [value[0], value[depth // 2]] for name, value in by_block.items()}


def with_defaults(built_from: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, and those defaults of the constructor that say how deep and wide it builds."""
    parameters = inspect.signature(built_from).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name in DEPTHS | HEADS | WIDTHS}
    return {name: value for name, value in defaults.items() if value not in (None, inspect.Parameter.empty)} | {
        **arguments
    }


@dataclass(frozen=True)
class _Sizes:
    """All integers below the names of one kind."""

    values: list[int]

    @staticmethod
    def of(arguments: Mapping[str, Any], names: frozenset[str]) -> _Sizes:
        return _Sizes([v for name in names & set(arguments) for v in _leaves(arguments[name]) if _is_size(v)])


def _narrowed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Widths and numbers of heads divided by one number that divides them all, so that a head keeps its width."""
    widths, heads = _Sizes.of(arguments, WIDTHS).values, _Sizes.of(arguments, HEADS).values
    if widths and max(heads, default=0) == min(heads, default=0) > HEADS_KEPT:
        common = heads[0]  # a single number of heads: down to two, whatever it is
        divisors = [common // kept for kept in range(HEADS_KEPT, common) if common % kept == 0]
    else:
        common = reduce(gcd, [*heads, *(width // 8 for width in widths if width % 8 == 0)], 0)
        divisors = [d for d in range(common, 1, -1) if common % d == 0]
    for divisor in divisors:
        if widths and all(w % divisor == 0 for w in widths) and min(widths) // divisor >= min(NARROWEST, min(widths)):
            names = {name for name in arguments if name in WIDTHS | HEADS}
            small = {n: _each(arguments[n], lambda v, by=divisor: v // by if _is_size(v) else v) for n in names}
            return arguments | small
    return _less_wide(arguments)


def _less_wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """Width multipliers become one half."""
    rounding = arguments.get("round_chs_fn")
    if isinstance(rounding, partial) and rounding.keywords.get("multiplier", 0) > LEAST_MULTIPLIER:
        arguments["round_chs_fn"] = partial(rounding.func, **{**rounding.keywords, "multiplier": LEAST_MULTIPLIER})
    return arguments


def _reduced_dataclass(value: Any, reduction: Reduction) -> Any:
    if not is_dataclass(value):
        return value
    content = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return replace(value, **reduced(content, reduction))


def _one_of_each(blocks: Sequence[Any]) -> list[Any]:
    """The first block of a stage, the first of every further kind, and the last one."""
    kinds = [block["block_type"] if isinstance(block, Mapping) else None for block in blocks]
    kept = {kinds.index(kind) for kind in kinds} | {0, len(blocks) - 1}
    return [block for index, block in enumerate(blocks) if index in kept]


def _capped(value: Any, most: int) -> Any:
    return _each(value, lambda item: min(item, most) if _is_size(item) else item)


def fingerprint(value: Any) -> str:
    """A text that two arguments share only if they say the same; a module says only what it alone is."""
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {id(value)}"
    if isinstance(value, partial):
        return f"partial({fingerprint(value.func)}, {fingerprint(value.args)}, {fingerprint(value.keywords)})"
    if is_dataclass(value) and not isinstance(value, type):
        content = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{fingerprint(type(value))}({fingerprint(content)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {fingerprint(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(fingerprint, value)) + "]"
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else repr(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, change) for item in value)
    return change(value)


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else [value]
