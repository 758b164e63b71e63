"""Measures approximate spectral scores: time and block membership on Gemma 3 270M.

    python benchmarks/approximate_spectrum.py [--layers 0,8,17] [--model FOLDER]

None of these methods is in the package, and this study shows why. With G = WᵀW and N the counting function of its
spectrum, `s_i = (W N(G) Wᵀ)_ii / ‖w_i‖²` (rows) and `s_j = (G N(G))_jj / G_jj` (columns). A polynomial instead of N
needs matrix products only: the row and column norms of `W T_k(G)`, k ≤ d, give a polynomial of degree 2d.

- range finder: `svd_lowrank` with q vectors; the rest of each coordinate's energy is put in the middle of the tail
- kpm: Chebyshev expansion of N from the exact eigenvalues (`eigvalsh`), with or without Jackson's damping
- least squares: the polynomial that fits N best at the exact eigenvalues, weighted by their energy
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _common import RESULTS, busy_elsewhere, gemma_weights, pick_device, provenance, seconds, write_results
from injection import NUM_BLOCKS, membership, svd_scores
from torch import Tensor

from smoa.maths.spectrum import spectral_scores
from smoa_lab.models.base_models import prepare_packaged_model

Scores = tuple[Tensor, Tensor]
RANGE_SIZES = (64, 128, 256, 512)
DEGREES = (4, 8, 16, 32, 64)
TIME_BAR, MEMBERSHIP_BAR = 0.2, 0.99


def tall(method: Callable[[Tensor], Scores]) -> Callable[[Tensor], Scores]:
    """`method` for weights of either orientation; it gets at least as many rows as columns."""

    def scores(weight: Tensor) -> Scores:
        if weight.shape[0] >= weight.shape[1]:
            return method(weight)
        columns, rows = method(weight.T)
        return rows, columns

    return scores


def range_finder(weight: Tensor, size: int) -> Scores:
    U, sigma, V = torch.svd_lowrank(weight, q=min(size, *weight.shape), niter=2)
    index = torch.arange(len(sigma), dtype=weight.dtype)
    tail = (len(sigma) + min(weight.shape) - 1) / 2
    return tuple(  # type: ignore[return-value]
        _with_tail((vectors * sigma).square(), index, total, tail)
        for vectors, total in ((U, weight.square().sum(1)), (V, weight.square().sum(0)))
    )


def _with_tail(energy: Tensor, index: Tensor, total: Tensor, tail: float) -> Tensor:
    rest = (total - energy.sum(1)).clamp_min(0)
    return (energy @ index + rest * tail) / total


def polynomial(weight: Tensor, degree: int, fit: str) -> Scores:
    """Scores with a polynomial of twice the degree instead of N: one product with G for each k ≤ degree."""
    gram = weight.T @ weight
    eigenvalues = torch.linalg.eigvalsh(gram).double().flip(0).clamp_min(0)
    top = eigenvalues[0].item() * 1.001
    coefficients = FITS[fit](eigenvalues, top, 2 * degree).to(weight.dtype)
    shifted = gram.mul_(2 / top)
    shifted.diagonal().sub_(1)
    rows, columns = _moments(weight, shifted, degree)
    return coefficients @ rows / rows[0], coefficients @ columns / columns[0]


def _moments(weight: Tensor, shifted: Tensor, degree: int) -> Scores:
    """`(W T_k Wᵀ)_ii` and `(G T_k)_jj` for k ≤ 2 degree, by T_2k = 2T_k² - 1 and T_2k+1 = 2 T_k T_k+1 - T_1."""
    sums: list[Scores] = []

    def keep(product: Tensor) -> None:
        sums.append((product.sum(1), product.sum(0)))

    keep(weight.square())
    previous, current = weight, weight @ shifted
    keep(previous * current)
    for _ in range(1, degree):
        keep(current.square())
        previous, current = current, torch.addmm(previous, current, shifted, beta=-1, alpha=2)
        keep(previous * current)
    keep(current.square())
    rows, columns = (torch.stack(side) for side in zip(*sums, strict=True))
    return _chebyshev(rows), _chebyshev(columns)


def _chebyshev(products: Tensor) -> Tensor:
    moments = 2 * products
    moments[2::2] -= products[0]
    moments[3::2] -= products[1]
    moments[:2] = products[:2]
    return moments


def chebyshev_series(eigenvalues: Tensor, top: float, degree: int) -> Tensor:
    """Coefficients of N by Gauss-Chebyshev quadrature."""
    angle = (torch.arange(8192, dtype=torch.float64) + 0.5) * torch.pi / 8192
    points = top * (torch.cos(angle) + 1) / 2
    above = len(eigenvalues) - torch.searchsorted(eigenvalues.flip(0), points)
    coefficients = torch.cos(torch.arange(degree + 1)[:, None] * angle) @ above.double() * (2 / 8192)
    coefficients[0] /= 2
    return coefficients


def jackson_series(eigenvalues: Tensor, top: float, degree: int) -> Tensor:
    """The same, damped (Weiße et al., Rev. Mod. Phys. 78, 275, 2006, eq. 71)."""
    k, size = torch.arange(degree + 1, dtype=torch.float64), degree + 2
    step = torch.tensor(torch.pi / size, dtype=torch.float64)
    kernel = ((size - k) * torch.cos(step * k) + torch.sin(step * k) / torch.tan(step)) / size
    return chebyshev_series(eigenvalues, top, degree) * kernel


def least_squares(eigenvalues: Tensor, top: float, degree: int) -> Tensor:
    """Coefficients that minimize Σ_j λ_j (p(λ_j) - j)². Small singular values are cut, because the sums are float32."""
    angle = torch.acos((2 * eigenvalues / top - 1).clamp(-1, 1))
    basis = torch.cos(angle[:, None] * torch.arange(degree + 1))
    index = torch.arange(len(eigenvalues), dtype=torch.float64)
    root = eigenvalues.sqrt()
    target = (index * root)[:, None]
    return torch.linalg.lstsq(basis * root[:, None], target, rcond=1e-3, driver="gelsd").solution[:, 0]


FITS = {"kpm": chebyshev_series, "kpm, damped": jackson_series, "least squares": least_squares}


def methods() -> dict[tuple[str, int], Callable[[Tensor], Scores]]:
    found = {("range finder", q): tall(partial(range_finder, size=q)) for q in RANGE_SIZES}
    for fit in FITS:
        found |= {(fit, degree): tall(partial(polynomial, degree=degree, fit=fit)) for degree in DEGREES}
    return found


def study(weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One entry per method: time ÷ exact method's, and the lowest and mean membership over the weights, by K."""
    reference = {name: svd_scores(weight.double()) for name, weight in weights.items()}
    exact = [seconds(lambda: [spectral_scores(weight) for weight in weights.values()]) for _ in range(3)]
    entries = []
    for (method, size), scores in methods().items():
        found: dict[str, Scores] = {}
        spent = seconds(lambda: found.update({name: scores(weight) for name, weight in weights.items()}))  # noqa: B023
        shares = [membership(found[name], reference[name]) for name in weights]
        by_blocks = {str(K): [share for found in shares for share in found[str(K)]] for K in NUM_BLOCKS}
        entries.append(
            {
                "method": method,
                "size": size,
                "seconds": spent,
                "exact_seconds": min(exact),
                "time_ratio": spent / min(exact),
                "lowest_membership": {K: min(values) for K, values in by_blocks.items()},
                "mean_membership": {K: mean(values) for K, values in by_blocks.items()},
            }
        )
        print(f"{method:14} {size:4} time {spent / min(exact):6.2f} lowest {entries[-1]['lowest_membership']}")
    return entries


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw lowest membership against time, one panel per K. Lines differ by dash and marker, to be readable in gray."""
    import matplotlib.pyplot as plt

    styles = dict(zip(("range finder", *FITS), ("s:", "o-", "^--", "D-."), strict=True))
    figure, axes = plt.subplots(1, len(NUM_BLOCKS), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, K in zip(axes, NUM_BLOCKS, strict=True):
        axis.axvspan(0.01, TIME_BAR, ymin=0, color="0.93", label="fast enough" if NUM_BLOCKS[0] == K else None)
        axis.axhline(MEMBERSHIP_BAR, color="0.3", linewidth=0.8)
        for shade, (method, style) in zip(("0.0", "0.15", "0.35", "0.5"), styles.items(), strict=True):
            points = [entry for entry in entries if entry["method"] == method]
            xs, ys = zip(*[(entry["time_ratio"], entry["lowest_membership"][str(K)]) for entry in points], strict=True)
            axis.plot(xs, ys, style, color=shade, label=method if NUM_BLOCKS[0] == K else None, markersize=5)
        axis.set(xscale="log", title=f"K = {K}", xlabel="time / exact method's time", ylim=(0, 1.03))
    axes[0].set_ylabel("lowest share of coordinates\nin the SVD's block, over all weights")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of Gemma 3 270M as safetensors (default: the cached one)")
    parser.add_argument("--layers", help="only these layers, as 0,8,17 (default: all)")
    parser.add_argument("--threads", type=int, help="torch threads; 1 measures CPU time, for a busy machine")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    wanted = arguments.layers.split(",") if arguments.layers else None
    weights = {
        n: w
        for n, w in gemma_weights(arguments.model or prepare_packaged_model())
        if wanted is None or n.split(".")[2] in wanted
    }
    others = busy_elsewhere()
    entries = study(weights)
    content = {
        "config": {"layers": arguments.layers or "all", "weights": len(weights)},
        "bars": {"time_ratio": TIME_BAR, "lowest_membership": MEMBERSHIP_BAR},
        "provenance": provenance(pick_device("cpu")) | {"cores_busy_elsewhere": others()},
        "results": entries,
    }
    print(write_results("approximate_spectrum", content))
    draw(entries, RESULTS / "approximate_spectrum.png")


if __name__ == "__main__":
    main()
