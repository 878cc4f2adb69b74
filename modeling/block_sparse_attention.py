"""Attention over a block pattern without touching a score or key outside it, as one operator with its own gradient.

Tile after tile, torch's own fused kernel gets the tile's queries and the keys and values it sees, laid side by side:
small enough to stay in the cache, and forgotten afterwards. For the backward pass only the inputs, the output and a
number per query (the logarithm of its softmax's denominator) are kept, so extra memory is linear in the tokens. For
CPUs: on a GPU the loop over tiles would wait for its launches.

To `torch.compile` the operator is opaque, so that a compiled model runs the same code.

Source: Dao et al. 2022, FlashAttention (arXiv 2205.14135), whose algorithm the kernel follows. Why the kernel is
called below torch's public function: docs/decisions/0003-cpu-kernel.md.
"""

import hashlib
from itertools import pairwise

import torch

from .pattern_tables import BlockPattern, derived

# Copies of this file (in the package, in a model's folder) each have their own operators.
NAMESPACE = f"bigbird_vit_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    *,
    pattern: BlockPattern,
    scaling: float,
) -> torch.Tensor:
    """Return attention `(B, H, N, D)` of `query`, `key` and `value`, each `(B, H, N, D)`, on a CPU.

    Half precision is computed in fp32. A query that sees no valid key gets zeros. There is no second derivative.

    Args:
        query: Tokens in tile-major order, global ones first.
        key: As `query`.
        value: As `query`.
        key_valid: `(B, N)` bool, false for keys that are padding; None if there are none.
        pattern: Which token sees which.
        scaling: Factor on the scores.
    """
    return _forward(query, key, value, key_valid, derived(pattern, visible_spans), scaling)[0].to(query.dtype)


def visible_spans(pattern: BlockPattern) -> torch.Tensor:
    """Return which tokens see which, as intervals of positions.

    Neighbouring tiles lie one behind the other in memory, so a window of 3x3 tiles is three intervals. The first row
    is that of the global tokens, if there are any; the others are the tiles'.

    Returns:
        `(heads or 1, rows, 1 + intervals, 2)` int64, first position and end: first the row's queries, then the keys
        they see; unused ones are empty, 0 to 0.
    """
    ends = (pattern.num_global_tokens + pattern.tile_sizes.cumsum(0)).tolist()
    bounds = list(pairwise([pattern.num_global_tokens, *ends]))
    front = [(0, pattern.num_global_tokens)] if pattern.num_global_tokens else []
    heads = []
    for table in pattern.neighbours.tolist():
        rows = [[*front, (0, pattern.num_tokens)]] if front else []
        for tile, seen in enumerate(table):
            spans = [*front]
            for start, end in (bounds[other] for other in seen if other >= 0):
                if spans and spans[-1][1] == start:
                    spans[-1] = (spans[-1][0], end)
                else:
                    spans.append((start, end))
            rows.append([bounds[tile], *([(0, pattern.num_tokens)] if tile in pattern.global_tiles else spans)])
        heads.append(rows)
    longest = max(len(row) for rows in heads for row in rows)
    filled = [[row + [(0, 0)] * (longest - len(row)) for row in rows] for rows in heads]
    return torch.tensor(filled, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    spans: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention `(B, H, N, D)` and the logarithm of each query's denominator `(B, H, N)`, at least in fp32."""
    output = _empty_output(query)
    log_sums = output.new_empty(query.shape[:3])
    padding = _padding(query, key_valid)
    for rows, (q, k, v), (out, sums) in _by_head(spans, (query, key, value), (output, log_sums)):
        for start, end, intervals in rows:
            mask, visible = _mask(padding, intervals)
            row, row_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, start:end], _seen(k, intervals), _seen(v, intervals), attn_mask=mask, scale=scaling
            )
            out[:, :, start:end] = row if visible is None else row * visible
            sums[:, :, start:end] = row_sums
    return output, log_sums


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_valid: torch.Tensor | None,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, padding = _work_dtype(query), _padding(query, key_valid)
    d_query = query.new_empty(query.shape, dtype=dtype)
    d_key, d_value = (query.new_zeros(query.shape, dtype=dtype) for _ in range(2))
    read, written = (grad_output, query, key, value, output, log_sums), (d_query, d_key, d_value)
    for rows, (d_out, q, k, v, out, sums), (dq, dk, dv) in _by_head(spans, read, written):
        for start, end, intervals in rows:
            mask, visible = _mask(padding, intervals)
            d_row = d_out[:, :, start:end] if visible is None else d_out[:, :, start:end] * visible
            dq[:, :, start:end], dk_row, dv_row = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_row,
                q[:, :, start:end],
                _seen(k, intervals),
                _seen(v, intervals),
                out[:, :, start:end],
                sums[:, :, start:end],
                0.0,
                False,
                attn_mask=mask,
                scale=scaling,
            )
            at = 0
            for first, last in intervals:
                dk[:, :, first:last] += dk_row[:, :, at : at + last - first]
                dv[:, :, first:last] += dv_row[:, :, at : at + last - first]
                at += last - first
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)


@_forward.register_fake
def _forward_fake(query, key, value, key_valid, spans, scaling):
    output = _empty_output(query)
    return output, output.new_empty(query.shape[:3])


@_backward.register_fake
def _backward_fake(grad_output, query, key, value, key_valid, output, log_sums, spans, scaling):
    return tuple(one.new_empty(one.shape) for one in (query, key, value))


def _keep(ctx, inputs, output):
    *tensors, spans, scaling = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.spans, ctx.scaling = spans, scaling  # the pattern keeps them anyway


def _gradients(ctx, grad_output, _):
    return *_backward(grad_output, *ctx.saved_tensors, ctx.spans, ctx.scaling), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _work_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _empty_output(query: torch.Tensor) -> torch.Tensor:
    """`(B, H, N, D)` with a token's heads side by side, so that the layer's next projection needs no copy."""
    batch, num_heads, num_tokens, head_dim = query.shape
    return query.new_empty(batch, num_tokens, num_heads, head_dim, dtype=_work_dtype(query)).transpose(1, 2)


def _by_head(spans: torch.Tensor, read: tuple[torch.Tensor, ...], written: tuple[torch.Tensor, ...]):
    """Yield the rows of a head and that head's part of each tensor; all heads at once if they share a table.

    What is read comes in the work dtype and with a head's numbers side by side, as the kernel wants it.
    """
    dtype = _work_dtype(read[0])
    read = tuple(one.to(dtype) if one.stride(-1) == 1 else one.to(dtype).contiguous() for one in read)
    for head, table in enumerate(spans.tolist()):
        heads = slice(None) if len(spans) == 1 else slice(head, head + 1)
        rows = [(start, end, [(first, last) for first, last in keys if last]) for (start, end), *keys in table]
        yield rows, [one[:, heads] for one in read], [one[:, heads] for one in written]


def _seen(tokens: torch.Tensor, intervals: list[tuple[int, int]]) -> torch.Tensor:
    """Lay the tokens of the intervals side by side: `(B, H, N, D)` -> `(B, H, visible, D)`."""
    parts = [tokens[:, :, first:last] for first, last in intervals]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _padding(query: torch.Tensor, key_valid: torch.Tensor | None) -> torch.Tensor | None:
    """Additive mask `(B, 1, N, 1)`: 0, or for padding the lowest finite number."""
    if key_valid is None:
        return None
    dtype = _work_dtype(query)
    mask = query.new_zeros(key_valid.shape, dtype=dtype)
    return mask.masked_fill(~key_valid, torch.finfo(dtype).min)[:, None, :, None]


def _mask(
    padding: torch.Tensor | None, intervals: list[tuple[int, int]]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the row's additive mask `(B, 1, 1, visible)`, and per image whether the row sees a valid key at all."""
    if padding is None:
        return None, None
    mask = _seen(padding, intervals).transpose(2, 3)
    return mask, (mask == 0).any(-1, keepdim=True)


__all__ = ["block_sparse_attention", "visible_spans"]
