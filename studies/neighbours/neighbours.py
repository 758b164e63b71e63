"""Neighbours of SMoA that PEFT lacks, and the two that it has by which these are checked: parametrizations of a frozen
linear layer in plain PyTorch.

W has m rows (outputs) and n columns (inputs), and is never trained; y = W x + ΔW x. Throughout, ⊙ multiplies entry by
entry, and a form of rank r trains r(m + n) numbers, as LoRA of rank r does.

    LoRA   ΔW = (α/r) B A
    HiRA   ΔW = W ⊙ (B A)
    BHRA   ΔW_ij = W_ij ⊙ (B_ij A_ij) for each block of a b × b grid; b = 1 is HiRA
    ABBA   ΔW = (α²/√(r₁ r₂)) (B₁ A₁) ⊙ (B₂ A₂)

Sources: LoRA arXiv:2106.09685; HiRA, Huang et al., ICLR 2025; BHRA arXiv:2509.21637 (its second version calls it BoHA);
ABBA arXiv:2505.14238 (ICLR 2026). Every ΔW is zero before the first step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factors = Mapping[str, Tensor]
POWER_ITERATIONS, MORE_DIRECTIONS = 10, 8
"""Of ABBA's truncated SVD: its code takes ten iterations as well, and no more directions than it keeps."""


class Form(ABC):
    """How ΔW is made of the trained factors."""

    @abstractmethod
    def start(self, W: Tensor) -> dict[str, Tensor]:
        """The factors before the first step, in float32, for W of (m, n)."""

    @abstractmethod
    def delta(self, factors: Factors, W: Tensor) -> Tensor:
        """ΔW of (m, n), in the factors' dtype."""

    def apply(self, x: Tensor, factors: Factors, W: Tensor) -> Tensor:
        """ΔW x for x of (…, n): (…, m), in x's dtype. ΔW is formed, and rounded to x's dtype once."""
        return F.linear(x, self.delta(factors, W).to(x.dtype))

    @abstractmethod
    def rank_bound(self, m: int, n: int) -> int:
        """The largest rank that ΔW can have where W and all of its blocks have full rank."""


@dataclass(frozen=True)
class LowRank(Form):
    """LoRA, arXiv:2106.09685: ΔW = (α/r) B A with A of (r, n) and B of (m, r).

    A is uniform on ±1/√n and B zero, as in PEFT.
    """

    r: int
    alpha: float

    def start(self, W: Tensor) -> dict[str, Tensor]:
        m, n = W.shape
        return {"A": _uniform((self.r, n), 1 / math.sqrt(n), W), "B": _zeros((m, self.r), W)}

    def delta(self, factors: Factors, W: Tensor) -> Tensor:
        return self.alpha / self.r * (factors["B"] @ factors["A"])

    def apply(self, x: Tensor, factors: Factors, W: Tensor) -> Tensor:
        return (self.alpha / self.r * _through(x, factors["A"], factors["B"])).to(x.dtype)

    def rank_bound(self, m: int, n: int) -> int:
        return min(m, n, self.r)


@dataclass(frozen=True)
class Grid(Form):
    """BHRA, arXiv:2509.21637: the grid of b × b blocks, each with factors of its own, modulated by its block of W.

        ΔW_ij = W_ij ⊙ (B_ij A_ij),    A_ij of (r/b, n/b), B_ij of (m/b, r/b),    i, j = 1…b

    A has all A_ij as (b, b, r/b, n/b), and B as (b, b, m/b, r/b): b² · (r/b) · (m + n)/b = r(m + n) numbers, as many as
    LoRA's of rank r. One block is HiRA. Each block starts as HiRA does: A_ij uniform on ±1/√(n/b), B_ij zero, no other
    scale.

    Without ``modulated`` it is the paper's control without W (its second version): ΔW_ij = B_ij A_ij.
    """

    r: int
    blocks: int = 1
    modulated: bool = True

    def start(self, W: Tensor) -> dict[str, Tensor]:
        m, n, b = *W.shape, self.blocks
        if m % b or n % b or self.r % b:
            raise ValueError(f"a grid of {b} × {b} blocks needs r, m and n that {b} divides, not {self.r}, {m}, {n}")
        rank, bound = self.r // b, 1 / math.sqrt(n // b)
        return {"A": _uniform((b, b, rank, n // b), bound, W), "B": _zeros((b, b, m // b, rank), W)}

    def delta(self, factors: Factors, W: Tensor) -> Tensor:
        return self._in_blocks(factors, W).transpose(1, 2).reshape(W.shape)

    def apply(self, x: Tensor, factors: Factors, W: Tensor) -> Tensor:
        rounded = self._in_blocks(factors, W).to(x.dtype)  # before they are put together: half as much is copied
        return F.linear(x, rounded.transpose(1, 2).reshape(W.shape))

    def _in_blocks(self, factors: Factors, W: Tensor) -> Tensor:
        """ΔW as (b, b, m/b, n/b)."""
        (m, n), b = W.shape, self.blocks
        products = factors["B"] @ factors["A"]
        return products * W.view(b, m // b, b, n // b).transpose(1, 2) if self.modulated else products

    def rank_bound(self, m: int, n: int) -> int:
        b, rank = self.blocks, self.r // self.blocks
        of_block = min(m // b, n // b, rank * min(m // b, n // b) if self.modulated else rank)
        return min(m, n, b * b * of_block)


@dataclass(frozen=True)
class Abba(Form):
    """ABBA, arXiv:2505.14238: a learned matrix of low rank where HiRA has W.

        ΔW = s (B₁ A₁) ⊙ (B₂ A₂),    s = α² / √(r₁ r₂),    r₁ = r₂ = r/2

    A₁ is (r₁, n), B₁ (m, r₁), A₂ (r₂, n) and B₂ (m, r₂). B₁ A₁ starts as W's best approximation of rank r₁, from its
    SVD U Σ Vᵀ: B₁ = U_r₁ Σ_r₁^½ and A₁ = Σ_r₁^½ V_r₁ᵀ. B₂ starts at zero, and A₂ uniform on ±√(6/n), Kaiming's bound,
    as the authors' code draws it. Were B₁ zero too, no gradient would ever be other than zero.

    With the rows' and columns' Khatri-Rao products, B_kr of (m, r₁ r₂) and A_kr of (r₁ r₂, n), ΔW x = s B_kr (A_kr x)
    (Theorem 1): no m × n matrix is formed, and the rank is at most r₁ r₂.
    """

    r: int
    alpha: float

    @property
    def scale(self) -> float:
        """s, whose 1/√(r₁ r₂) keeps the size of gradients whatever the ranks are (Theorem 2)."""
        return self.alpha**2 / (self.r // 2)

    def start(self, W: Tensor) -> dict[str, Tensor]:
        m, n = W.shape
        if self.r < 2 or self.r % 2:
            raise ValueError(f"ABBA halves r, which is {self.r}")
        half = self.r // 2
        B1, A1 = truncated_svd(W, half)
        return {"A1": A1, "B1": B1, "A2": _uniform((half, n), math.sqrt(6 / n), W), "B2": _zeros((m, half), W)}

    def delta(self, factors: Factors, W: Tensor) -> Tensor:
        return self.scale * (factors["B1"] @ factors["A1"]) * (factors["B2"] @ factors["A2"])

    def apply(self, x: Tensor, factors: Factors, W: Tensor) -> Tensor:
        m, n = W.shape
        B = (factors["B1"][:, :, None] * factors["B2"][:, None, :]).reshape(m, -1)
        A = (factors["A1"][:, None, :] * factors["A2"][None, :, :]).reshape(-1, n)
        return (self.scale * _through(x, A, B)).to(x.dtype)

    def rank_bound(self, m: int, n: int) -> int:
        return min(m, n, (self.r // 2) ** 2)


class Adapted(nn.Module):
    """A frozen linear layer with a form's update: y = W x + c + ΔW x."""

    def __init__(self, base: nn.Linear, form: Form) -> None:
        super().__init__()
        self.base, self.form = base.requires_grad_(False), form
        self.factors = nn.ParameterDict(form.start(base.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        updated: Tensor = self.base(x) + self.form.apply(x, dict(self.factors.items()), self.base.weight)
        return updated


def truncated_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B of (m, rank) and A of (rank, n), in float32: B A is the best approximation of W of that rank, and the singular
    values are shared by both halves. By power iterations with a few directions more than are kept."""
    if W.is_meta:  # of a model without weights, whose parameters are only counted
        return _zeros((W.shape[0], rank), W), _zeros((rank, W.shape[1]), W)
    directions = min(*W.shape, rank + MORE_DIRECTIONS)
    U, S, V = torch.svd_lowrank(W.float(), q=directions, niter=POWER_ITERATIONS)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).contiguous(), (V[:, :rank] * root).T.contiguous()


def _uniform(shape: tuple[int, ...], bound: float, W: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=W.device).uniform_(-bound, bound)


def _zeros(shape: tuple[int, ...], W: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=W.device)


def _through(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B A x for x of (…, n), in the factors' dtype."""
    return F.linear(F.linear(x.to(A.dtype), A), B)
