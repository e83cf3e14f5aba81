"""`nn.MultiheadAttention`: decomposed into intercepted operations, with the batch in dimension 0.

The framework's own function keeps the batch in dimension 1, where single examples cannot be told apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_head_attention(
    call: Any, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`F.multi_head_attention_forward` on `query [t, n, e]`, `key` and `value [s, n, e]`."""
    rare = {"bias_k": bias_k, "bias_v": bias_v, "static_k": static_k, "static_v": static_v}
    given = [name for name, argument in rare.items() if argument is not None] + ["add_zero_attn"] * add_zero_attn
    if given or query.ndim != 3:
        call.refuse(f"nn.MultiheadAttention with {given or 'an unbatched input'} has no rule")
    with call.intercepted():
        same = key is query and value is query
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if use_separate_proj_weight:
            biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        elif same:
            q, k, v = F.linear(q, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
        else:
            biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), in_proj_weight.chunk(3), biases, strict=True))
        n, target, embed = q.shape
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [n, h, t, e/h]
        mask = _additive_mask(q, attn_mask, key_padding_mask, num_heads, n)
        scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
        attention = (scores if mask is None else scores + mask).softmax(-1)
        if training and dropout_p > 0:
            attention = F.dropout(attention, dropout_p)
        out = (attention @ v).transpose(1, 2).reshape(n, target, embed)
        out = F.linear(out, out_proj_weight, out_proj_bias).transpose(0, 1)
        if not need_weights:
            return out, None
        return out, attention.mean(1) if average_attn_weights else attention


def _additive_mask(
    q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, n: int
) -> Tensor | None:
    """Both masks as one to add to the scores `[n, h, t, s]`; where a boolean mask is true, attention is forbidden."""
    mask = None
    if attn_mask is not None:
        mask = _as_additive(attn_mask, q)
        if mask.ndim == 3:
            mask = mask.unflatten(0, (n, heads))
    if key_padding_mask is not None:
        padding = _as_additive(key_padding_mask, q)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def _as_additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
