r"""Computes the spectral scores of a weight, and its partition into aligned blocks.

With `W = U diag(σ) Vᵀ` (economy, σ descending, j = 0 … q-1) each output coordinate i has the spectral score

    s_i = Σ_j j·U_ij²·σ_j² / Σ_j U_ij²·σ_j²

and each input coordinate the same with V (arXiv:2605.21147). A low score means that most of the coordinate's energy is
in the leading singular directions. A coordinate of zero energy scores 0. Sorting both sides by score (ascending,
stable) and cutting each order into K runs gives the K aligned blocks. `smoa.partition` has the table of symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from smoa.errors import ConfigError, PartitionError
from smoa.kernels.autograd import without_autocast
from smoa.partition import Blocks, block_sizes, check_num_blocks

Labelling = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Of a weight (out_features, in_features) and K: the block of each output and of each input coordinate."""
KINDS = ("spectral", "contiguous", "random")
_registered: dict[str, Labelling] = {}

GRAM_TILES = 8
"""Number of strips in which the upper half of the Gram matrix is formed."""
CLOSE_SCORES = 1e-6
"""float32 may sort two scores wrongly if they differ by less than this times min(m, n)."""
ROW_TILE = 1024
"""Number of rows of WV that are computed at a time, so that no buffer has the weight's size."""


def register_partition(name: str, labelling: Labelling) -> None:
    """Let `SmoaConfig(partition=name)` cut weights by a function of your own; a later one of that name replaces it.

    A saved adapter holds its labels: to load, serve or merge it nobody needs the function.

    Args:
        name: Any name but those that smoa has.
        labelling: Takes the weight, (out_features, in_features), and K. Returns integers from 0 to K - 1, for each
            output and for each input coordinate; block k has as many as piece k of `torch.tensor_split`.

    Raises:
        ConfigError: smoa has a partition of this name.
    """
    if name in KINDS:
        raise ConfigError(f"register_partition: smoa has a partition {name!r}; take another name")
    _registered[name] = labelling


def partition_kinds() -> tuple[str, ...]:
    """The names by which weights can be cut."""
    return (*KINDS, *_registered)


def spectral_scores(weight: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    """Energy-weighted mean spectral index of every output and input coordinate of `weight`.

    Args:
        weight: (out_features, in_features), any floating dtype. Computed in float64 for float64, else in float32.
        precise: Compute eigenvectors and sums in float64 for all dtypes, which takes about 1.7 times as long.

    Returns:
        Row scores (out_features,) and column scores (in_features,), float32 or float64, on the weight's device or, if
        that can't decompose, on the CPU.

    Raises:
        PartitionError: the weight has NaN or infinite entries.
    """
    weight = weight.detach().to(decomposition_device(weight.device))
    weight = weight if weight.dtype == torch.float64 else weight.float()
    finite_peak(weight)
    with _highest_precision(), without_autocast(weight.device.type):
        if weight.shape[0] >= weight.shape[1]:
            return _tall_scores(weight, precise)
        col_scores, row_scores = _tall_scores(weight.T, precise)
        return row_scores, col_scores


@contextmanager
def _highest_precision() -> Iterator[None]:
    """Keep TF32, and bfloat16 on a CPU, out of products of float32, whatever is set for the model's own."""
    with ExitStack() as restored:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            backends: Any = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
            for backend in backends:
                restored.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:  # before PyTorch 2.9
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def finite_peak(weight: Tensor) -> Tensor:
    """The largest magnitude of an entry; raises PartitionError if one is NaN or infinite."""
    peak = torch.stack(torch.aminmax(weight.detach())).abs().max()
    if not torch.isfinite(peak):
        raise PartitionError("the weight has NaN or infinite entries; load finite weights")
    return peak


def _tall_scores(weight: Tensor, precise: bool) -> tuple[Tensor, Tensor]:
    """Scores of a weight with at least as many rows as columns, from the Gram matrix of its columns.

    `WᵀW = V diag(λ) Vᵀ` and `UΣ = WV`, so the row energies are `(WV)²` and the column energies `V²λ`. No division by σ.
    """
    gram = _upper_gram(weight)
    col_is_zero = gram.diagonal() == 0
    eigenvalues, vectors = torch.linalg.eigh(gram.double() if precise else gram, UPLO="U")
    energy = eigenvalues.clamp_min(0)  # σ², ascending
    index = torch.arange(len(energy) - 1, -1, -1, dtype=energy.dtype, device=gram.device)
    del gram
    row_scores = _row_scores(weight, vectors.to(weight.dtype), index)
    col_scores = _mean_index(vectors.square_() * energy, index)
    return row_scores, col_scores.masked_fill_(col_is_zero, 0)  # a zero column may have energy from rounding


def _upper_gram(weight: Tensor) -> Tensor:
    """`WᵀW` on and above the diagonal, which is all that `eigh` reads, with about half the multiplications.

    The upper half, because MKL's `eigh` is faster on it. Some entries below the diagonal are set too.
    """
    size = weight.shape[1]
    gram = weight.new_zeros(size, size)
    tile = -(-size // GRAM_TILES)
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        torch.mm(weight[:, start:stop].T, weight[:, start:], out=gram[start:stop, start:])
    return gram


def _row_scores(weight: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """Σ_j j (WV)_ij² / Σ_j (WV)_ij², computed a tile of rows at a time in one buffer."""
    buffer = weight.new_empty(min(ROW_TILE, len(weight)), len(index))
    scores = []
    for rows in torch.split(weight, ROW_TILE):
        projected = torch.mm(rows, vectors, out=buffer[: len(rows)])
        scores.append(_mean_index(projected.square_(), index))
    return torch.cat(scores)


def _mean_index(energy: Tensor, index: Tensor) -> Tensor:
    """Σ_j index_j energy_ij / Σ_j energy_ij, summed in the dtype of `index`; 0 where the energy is 0.

    The index is counted from its middle, which halves the terms and so their rounding errors.
    """
    middle = (len(index) - 1) / 2
    moments = energy.to(index.dtype) @ torch.stack([index - middle, torch.ones_like(index)], 1)
    numerator, total = moments.unbind(1)
    return torch.where(total > 0, numerator / total.clamp_min(torch.finfo(total.dtype).tiny) + middle, 0)


def labels_from_scores(scores: Tensor, num_blocks: int) -> Tensor:
    """Block of each coordinate, uint8: sort `scores` (ascending, stable), and cut the order as `torch.tensor_split`."""
    order = torch.argsort(scores, stable=True)
    labels = torch.empty(len(scores), dtype=torch.uint8, device=scores.device)
    labels[order] = contiguous_labels(len(scores), num_blocks, scores.device)
    return labels


def _cut_is_close(scores: Tensor, num_blocks: int, spectrum_size: int) -> bool:
    """Whether a cut falls between two scores that differ by less than the error of float32.

    Equal scores do not count: they keep their natural order in any precision.
    """
    ends = torch.tensor(block_sizes(len(scores), num_blocks), device=scores.device).cumsum(0)[:-1]
    ascending = scores.sort().values
    gaps = ascending[ends] - ascending[ends - 1]
    return bool(((gaps > 0) & (gaps < CLOSE_SCORES * spectrum_size)).any())


def contiguous_labels(size: int, num_blocks: int, device: torch.device | None = None) -> Tensor:
    """Labels of K runs of neighboring coordinates, uint8 (size,)."""
    sizes = torch.tensor(block_sizes(size, num_blocks), device=device)
    blocks = torch.arange(num_blocks, dtype=torch.uint8, device=device)
    return torch.repeat_interleave(blocks, sizes, output_size=size)


def make_partition(
    weight: Tensor,
    num_blocks: int,
    kind: str = "spectral",
    scores_of: Callable[[Tensor, bool], tuple[Tensor, Tensor]] = spectral_scores,
    generator: torch.Generator | None = None,
) -> Blocks:
    """Partition `weight` into `num_blocks` aligned blocks.

    If float32 can't separate the two scores at a cut, the weight is decomposed again in float64. So a weight gets the
    same blocks on every device and with any number of threads.

    Args:
        weight: (out_features, in_features), any floating dtype.
        num_blocks: K.
        kind: "spectral" sorts by spectral score, "contiguous" cuts the natural order (as MELoRA does), "random"
            shuffles; or a name that was registered.
        scores_of: `spectral_scores`, or a cache of it.
        generator: What shuffles, on the CPU; by default torch's global one.

    Returns:
        The blocks, with labels on the weight's device.

    Raises:
        PartitionError: K is not between 1 and min(out_features, in_features, 255), or the weight has NaN or infinite
            entries; or the labels of a registered function are none.
        ConfigError: there is no such kind.
    """
    if kind not in partition_kinds():
        raise ConfigError(
            f"partition={kind!r} must be one of {partition_kinds()}, or registered: smoa.register_partition"
        )
    out_features, in_features = weight.shape
    check_num_blocks(num_blocks, out_features, in_features)
    finite_peak(weight)
    if kind in _registered:
        with without_autocast(weight.device.type):
            given = _registered[kind](weight.detach().clone(), num_blocks)
        rows, cols = (torch.as_tensor(side).to(weight.device, torch.uint8) for side in given)
        if (len(rows), len(cols)) != weight.shape:
            raise PartitionError(
                f"partition={kind!r}: its function must return {out_features} and {in_features} labels"
            )
        return Blocks(rows, cols, num_blocks)
    if kind == "contiguous":
        scores = torch.zeros(out_features), torch.zeros(in_features)
    elif kind == "random":
        draw = partial(torch.rand, dtype=torch.float32, device="cpu", generator=generator)
        scores = draw(out_features), draw(in_features)
    else:
        scores = scores_of(weight, False)
        if weight.dtype != torch.float64 and any(_cut_is_close(s, num_blocks, min(weight.shape)) for s in scores):
            scores = scores_of(weight, True)
    row_labels, col_labels = (labels_from_scores(s, num_blocks).to(weight.device) for s in scores)
    return Blocks(row_labels, col_labels, num_blocks)


@cache
def decomposition_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU if the device has no float64 or no decompositions, as Apple's MPS."""
    try:
        torch.linalg.eigh(torch.eye(2, device=device).double())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # PyTorch raises TypeError for a dtype that MPS lacks
        return torch.device("cpu")
    return device
