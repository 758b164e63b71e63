"""The method in its most naive form: the oracle that every test of smoa is held against.

Written from the formulas of SMoA (arXiv:2605.21147) and from nothing else: one full SVD, Python loops over coordinates
and entries, dense float64 matrices. It imports nothing of smoa and never tries to be fast.

Letters: W (m, n) frozen weight, m = out_features, n = in_features; K blocks; r_k the rank of block k, r = sum of r_k;
A (r, ceil(n / K)) and B (ceil(m / K), r) the compact factors, block k owning r_k rows of A and r_k columns of B.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def block_sizes(size: int, num_blocks: int) -> list[int]:
    """Lengths of K runs that differ by at most one, the longer ones first."""
    return [size // num_blocks + (1 if k < size % num_blocks else 0) for k in range(num_blocks)]


def block_ranks(r: int, num_blocks: int) -> list[int]:
    """r split evenly, the remainder to the first blocks."""
    return block_sizes(r, num_blocks)


def scores(weight: Tensor) -> tuple[list[float], list[float]]:
    """s_i = sum_j j U_ij^2 sigma_j^2 / sum_j U_ij^2 sigma_j^2 of outputs, and with V of inputs; 0 at zero energy."""
    weight = weight.detach().double()
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    row_scores = [0.0 if (weight[i] == 0).all() else _mean_index(U[i], sigma) for i in range(weight.shape[0])]
    col_scores = [0.0 if (weight[:, j] == 0).all() else _mean_index(Vh[:, j], sigma) for j in range(weight.shape[1])]
    return row_scores, col_scores


def _mean_index(vector: Tensor, sigma: Tensor) -> float:
    energy = [(u * s) ** 2 for u, s in zip(vector.tolist(), sigma.tolist(), strict=True)]
    return sum(j * e for j, e in enumerate(energy)) / sum(energy)


def labels(values: Sequence[float], num_blocks: int) -> list[int]:
    """Block of each coordinate: sort ascending and stable, cut into K runs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    result = [0] * len(values)
    start = 0
    for k, size in enumerate(block_sizes(len(values), num_blocks)):
        for i in order[start : start + size]:
            result[i] = k
        start += size
    return result


def spectral_labels(weight: Tensor, num_blocks: int) -> tuple[list[int], list[int]]:
    row_scores, col_scores = scores(weight)
    return labels(row_scores, num_blocks), labels(col_scores, num_blocks)


def contiguous_labels(size: int, num_blocks: int) -> list[int]:
    return [k for k, length in enumerate(block_sizes(size, num_blocks)) for _ in range(length)]


def delta_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    row_labels: Sequence[int],
    col_labels: Sequence[int],
    ranks: Sequence[int],
    scaling: float | Sequence[float],
    modulation: str = "hadamard",
) -> Tensor:
    """Dense delta W (m, n), entry by entry: s_k (B_k A_k)_ij in the diagonal blocks, times W_ij if "hadamard"; else 0.

    `scaling` is one s for all blocks, or one for each.

    Differentiable in weight, A and B.
    """
    row_place, col_place = _place_in_block(row_labels), _place_in_block(col_labels)
    zero = torch.zeros((), dtype=A.dtype)
    entries = []
    for i, row_block in enumerate(row_labels):
        for j, col_block in enumerate(col_labels):
            if row_block != col_block:
                entries.append(zero)
                continue
            start = sum(ranks[:row_block])
            owned = slice(start, start + ranks[row_block])
            s = scaling if isinstance(scaling, (int, float)) else scaling[row_block]
            entry = s * (B[row_place[i], owned] * A[owned, col_place[j]]).sum()
            entries.append(entry * weight[i, j] if modulation == "hadamard" else entry)
    return torch.stack(entries).reshape(len(row_labels), len(col_labels))


def _place_in_block(block_labels: Sequence[int]) -> list[int]:
    """Position of each coordinate in its block, which keeps the natural order."""
    seen: dict[int, int] = {}
    places = []
    for block in block_labels:
        places.append(seen.get(block, 0))
        seen[block] = places[-1] + 1
    return places


def effective_weight(weight: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """W plus every active adapter's delta W, each of them made from the pristine W."""
    result = weight
    for delta in deltas:
        result = result + delta
    return result


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    dropped: Sequence[Tensor] | None = None,
) -> Tensor:
    """y = x W^T + b + sum_a x_a delta_a^T, where x_a is x, or what dropout made of it for adapter a."""
    result = x @ weight.T
    for a, delta in enumerate(deltas):
        result = result + (x if dropped is None else dropped[a]) @ delta.T
    return result if bias is None else result + bias


def embedding(tokens: Sequence[int], table: Tensor) -> Tensor:
    """The rows of the table (num_embeddings, embedding_dim), one for each token."""
    return torch.stack([table[token] for token in tokens])


def convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    mode: str = "zeros",
) -> Tensor:
    """y[b, o, p] = sum_{c, t} kernel[o, c, t] x[b, first + c, p stride + t dilation - padding], entry by entry.

    `first` is the first channel of the group of o. `padding` has the entries before and after each dimension.
    """
    sizes, lengths = x.shape[2:], kernel.shape[2:]
    counts = [
        (sizes[d] + sum(padding[d]) - dilation[d] * (lengths[d] - 1) - 1) // stride[d] + 1 for d in range(len(sizes))
    ]
    in_group, out_group = kernel.shape[1], kernel.shape[0] // groups
    entries = []
    for o, *place in product(range(len(kernel)), *map(range, counts)):
        total = torch.zeros(len(x), dtype=x.dtype)
        for c, *tap in product(range(in_group), *map(range, lengths)):
            found = [
                _inside(p * stride[d] + t * dilation[d] - padding[d][0], sizes[d], mode)
                for d, (p, t) in enumerate(zip(place, tap, strict=True))
            ]
            if None not in found:
                total = total + kernel[(o, c, *tap)] * x[(slice(None), o // out_group * in_group + c, *found)]
        entries.append(total)
    return torch.stack(entries, dim=1).reshape(len(x), len(kernel), *counts)


def _inside(position: int, size: int, mode: str) -> int | None:
    """Index that a position before or after a dimension stands for; None for a zero."""
    if 0 <= position < size or mode == "zeros":
        return position if 0 <= position < size else None
    mirrored = -position if position < 0 else 2 * (size - 1) - position
    return {"circular": position % size, "replicate": min(max(position, 0), size - 1), "reflect": mirrored}[mode]


def parameter_count(out_features: int, in_features: int, ranks: Sequence[int]) -> int:
    """sum_k r_k (|I_k| + |J_k|)."""
    num_blocks = len(ranks)
    rows, cols = block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks)
    return sum(r_k * (rows[k] + cols[k]) for k, r_k in enumerate(ranks))


def rank_bound(
    weight: Tensor,
    row_labels: Sequence[int],
    col_labels: Sequence[int],
    ranks: Sequence[int],
    modulation: str = "hadamard",
) -> int:
    """sum_k min(|I_k|, |J_k|, r_k rank M_k), with rank M_k = 1 where nothing modulates."""
    total = 0
    for k, r_k in enumerate(ranks):
        rows = [i for i, block in enumerate(row_labels) if block == k]
        cols = [j for j, block in enumerate(col_labels) if block == k]
        anchor = weight.double()[rows][:, cols]
        anchor_rank = int(torch.linalg.matrix_rank(anchor)) if modulation == "hadamard" else 1
        total += min(len(rows), len(cols), r_k * anchor_rank)
    return total


def factor_shapes(
    out_features: int, in_features: int, num_blocks: int, r: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B."""
    return (r, math.ceil(in_features / num_blocks)), (math.ceil(out_features / num_blocks), r)


def real_entries(out_features: int, in_features: int, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Masks of A and B that are False where a ragged block leaves padding."""
    num_blocks = len(ranks)
    A_shape, B_shape = factor_shapes(out_features, in_features, num_blocks, sum(ranks))
    in_A, in_B = torch.zeros(A_shape, dtype=torch.bool), torch.zeros(B_shape, dtype=torch.bool)
    rows, cols = block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks)
    start = 0
    for k, r_k in enumerate(ranks):
        in_A[start : start + r_k, : cols[k]] = True
        in_B[: rows[k], start : start + r_k] = True
        start += r_k
    return in_A, in_B
