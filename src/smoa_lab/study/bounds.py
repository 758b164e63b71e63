"""One-sided bounds on what an entry of a study loses against another, over seeds and groups of rows.

Y_i (S, G) are an entry's values, lower is better: sums over each of G groups of rows that belong together, for each of
S seeds; w (G,) are the groups' tokens or rows, W = Σ w. The contrast of an ordered pair asks whether i keeps a share
1 − τ of what j gained over the base model, whose values are Y_0:

    d = Y_i − (1 − τ) Y_j − τ Y_0                                       θ = Σ d / (S W), below 0 where i does
    v_R = Σ_g (d̄_g − w_g θ)² / (1 − w_g / W) / W² − V                   error by the choice of groups
    V   = Σ (u_sg − ū_g)² / ((S − 1) S W²),  u_sg = d_sg − w_g θ_s      what a row does in one seed and not in others
    v_S = (1 + (1 − τ)²) · max(pooled, own) / S                         error by the choice of seeds
    U   = θ + t(1 − level) · √(v_R + v_S)                               degrees by Satterthwaite

A group that is a large part of all draws θ to itself, by which its own part of v_R is small: hence 1 − w_g / W, and
degrees of freedom for groups whose values vary with w_g (Bell and McCaffrey, 2002). Of G equal groups these are
G / (G − 1) and G − 1.

*pooled* is the mean variance over seeds of all entries, with Σ (n − 1) degrees, *own* that of the pair. Several sizes
are pooled each by itself, and a pair of two sizes has the variances of both pools, with Satterthwaite's degrees. Where
the pair's exceeds the others' by F's 90 % point, one wild entry may be its cause, and the pair has Welch's degrees,
which are as few as that one's. Where the pooled variance has two degrees or fewer, as with two seeds of two entries,
Satterthwaite's are too many where these agree by chance; then t is the mean of both parts' own, weighted by their
variances (Cochran and Cox, 1950). V is part of how seeds differ, and is not counted twice. For shares of right answers
v_R has one group more, which lies a whole answer off (+ 1 / W²): ten groups without an error don't show that there are
none.

studies/calibration.py measures how often the bounds miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtri, stdtrit

from smoa_lab.study.calibrated import LEVELS

Floats = NDArray[np.float64]
WILD = 0.9
"""The point of F's distribution beyond which a pair's variance is its own; of two entries, the larger variance is
compared with the smaller, either of which may be the wild one."""
FEW = 2
"""Degrees of freedom of the pooled variance up to which each part has its own t."""
FIRST_EXTENSION = 0.005
"""The level of the first look beyond the planned rounds; each further one has half of it."""


def spread_of(right: Sequence[float]) -> float:
    """The standard deviation of right answers by a few, by Laplace's rule of succession: none of them is no 0."""
    share = (sum(right) + 1) / (len(right) + 2)
    return math.sqrt(share * (1 - share))


def expected_width(entries: int, rounds: int, groups: int, noise: tuple[float, float], level: float) -> float:
    """About which difference such a study tells in its last round at this ``level``, that of a look, by the ``noise``
    of a seed's mean and of a row."""
    of_rows, of_seeds = np.asarray(noise[1] ** 2 / groups), np.asarray(2 * noise[0] ** 2 / rounds)
    freedom = np.asarray(entries * (rounds - 1.0))
    found = Estimate(np.zeros(()), of_rows, max(1, groups - 1), of_seeds, freedom, freedom <= FEW)
    return float(found.upper(level / max(1, entries - 1)))


def level_of(entries: int, planned: int, extensions: int = 0) -> float:
    """What a look errs at most, over all pairs of one entry. Looks at the ``planned`` rounds, from the second on, have
    a constant level, by which all of them together err in 4 %; that of an extension is its own."""
    if extensions:
        return FIRST_EXTENSION / 2.0 ** (extensions - 1)
    of_rounds = LEVELS[min(entries, max(LEVELS))]
    last = len(of_rounds) + 1
    return of_rounds[min(max(planned, 2), last) - 2] * min(1.0, last / max(planned, 1))


@dataclass(frozen=True)
class Estimate:
    """A contrast θ, of one study or of many (arrays): with the variances that rows and seeds give it, and their
    degrees of freedom; ``is_few`` where the pool of seeds has :data:`FEW`."""

    mean: Floats
    of_rows: Floats
    rows_freedom: float
    of_seeds: Floats
    seeds_freedom: Floats
    is_few: NDArray[np.bool_] | bool = False

    @property
    def freedom(self) -> Floats:
        """Of both parts together, by Satterthwaite; infinite where neither errs."""
        parts = self.of_rows**2 / self.rows_freedom + self.of_seeds**2 / self.seeds_freedom
        whole = (self.of_rows + self.of_seeds) ** 2
        return np.asarray(np.divide(whole, parts, where=parts > 0, out=np.full_like(whole, np.inf)))

    def upper(self, level: float | Floats) -> Floats:
        """θ is above it in a share ``level`` of studies."""
        return np.asarray(self.mean + self._width(level))

    def lower(self, level: float | Floats) -> Floats:
        return np.asarray(self.mean - self._width(level))

    def _width(self, level: float | Floats) -> Floats:
        whole = self.of_rows + self.of_seeds
        together = stdtrit(np.minimum(self.freedom, 1e9), 1 - level) * np.sqrt(whole)
        if not np.any(self.is_few):
            return np.asarray(together)
        of_rows, of_seeds = (stdtrit(each, 1 - level) for each in (self.rows_freedom, self.seeds_freedom))
        apart = (of_rows * self.of_rows + of_seeds * self.of_seeds) / np.sqrt(np.where(whole > 0, whole, 1.0))
        return np.asarray(np.where(self.is_few, apart, together))

    def after(self, rounds: float, seeds: int) -> Estimate:
        """What is to be expected after so many rounds in place of ``seeds``."""
        more = np.asarray(self.seeds_freedom * (rounds - 1) / (seeds - 1))
        is_few = self.is_few & (more <= FEW)
        return Estimate(self.mean, self.of_rows, self.rows_freedom, self.of_seeds * seeds / rounds, more, is_few)


def contrast(
    values: Floats,
    untouched: Floats,
    weights: Floats,
    of: int,
    other: int | None,
    kept: float,
    is_share: bool = False,
    pools: Sequence[int] = (),
) -> Estimate:
    """θ of two entries, or of one and the base model where ``other`` is None.

    ``values`` are (..., entries, seeds, groups), ``untouched`` (..., 1 or seeds, groups), ``weights`` (groups,), and
    ``kept`` is 1 − τ. There are two seeds and two groups or more. An entry with values that aren't finite has no
    variance. ``pools`` are the sizes of entries, by default one.
    """
    entries, seeds = values.shape[-3:-1]
    total = weights.sum()
    own_values = values[..., of, :, :]
    if other is None:
        gaps, pair, shares = own_values - untouched, [of], np.ones(1)
    else:
        gaps = own_values - kept * values[..., other, :, :]
        gaps = gaps - (1 - kept) * untouched if kept != 1 else gaps
        pair, shares = [of, other], np.array([1.0, kept**2])
    of_seed = gaps.sum(axis=-1) / total
    mean = of_seed.mean(axis=-1)
    around = gaps.mean(axis=-2) - weights * mean[..., None]
    apart = gaps - weights * of_seed[..., None]
    part = weights / total
    of_rows = (around**2 / (1 - part)).sum(axis=-1) - apart.var(axis=-2, ddof=1).sum(axis=-1) / seeds
    of_rows = (np.maximum(0.0, of_rows) + is_share) / total**2
    with np.errstate(invalid="ignore"):
        variances = (values.sum(axis=-1) / total).var(axis=-1, ddof=1)
    known = np.isfinite(variances)
    pools = pools or [0] * entries
    pooled, freedom = _pooled(
        variances, known, [[n for n in range(entries) if pools[n] == pools[i]] for i in pair], shares
    )
    is_few = freedom * (seeds - 1) <= FEW
    own = (shares * variances[..., pair]).sum(axis=-1) / shares.sum()
    rest = [n for n in range(entries) if n not in pair and pools[n] in [pools[i] for i in pair]]
    others, others_known = _mean_of(variances, known, rest)
    spread, has_others = variances[..., pair], others_known > 0
    if len(pair) == 2 or has_others.any():  # without others, the larger variance against the smaller
        compared = np.where(has_others, own, spread.max(axis=-1))
        others = np.where(has_others, others, spread.min(axis=-1))
        own_freedom = (seeds - 1) * np.where(has_others, len(pair), 1)
        wild = np.where(has_others, WILD, (1 + WILD) / 2)
        point = fdtri(own_freedom, np.maximum(1, others_known) * (seeds - 1), wild)
        is_wild = (has_others | (len(pair) == 2)) & (compared > point * others)
        parts = ((shares * spread) ** 2).sum(axis=-1)
        welch = np.divide((shares * spread).sum(axis=-1) ** 2, parts, where=parts > 0, out=np.ones_like(parts))
        freedom = np.where(is_wild, welch, freedom)
    of_seeds = shares.sum() * np.maximum(pooled, own) / seeds
    drawn = part**2 / (1 - part)
    rows_freedom = 1 / float((part**2).sum() + drawn.sum() ** 2 - (drawn**2).sum())
    return Estimate(mean, of_rows, rows_freedom, of_seeds, freedom * (seeds - 1), is_few)


def _pooled(
    variances: Floats, known: NDArray[np.bool_], pools: Sequence[Sequence[int]], shares: Floats
) -> tuple[Floats, Floats]:
    """The variance of a pair's mean entry by the pools of both, and its degrees in those of one seed."""
    means, counts = zip(*(_mean_of(variances, known, pool) for pool in pools), strict=True)
    if len({tuple(pool) for pool in pools}) == 1:
        return means[0], counts[0]
    parts = [share * mean for share, mean in zip(shares, means, strict=True)]
    errs = sum(part**2 / count for part, count in zip(parts, counts, strict=True))
    freedom = np.divide(sum(parts) ** 2, errs, where=errs > 0, out=np.asarray(sum(counts)))
    return np.asarray(sum(parts) / shares.sum()), freedom


def _mean_of(variances: Floats, known: NDArray[np.bool_], which: Sequence[int]) -> tuple[Floats, Floats]:
    """The mean of the known ones among them, and how many these are."""
    own, counts = known[..., list(which)], known[..., list(which)].sum(axis=-1)
    found = np.where(own, variances[..., list(which)], 0.0).sum(axis=-1) / np.maximum(1, counts)
    return found, counts.astype(float)


@dataclass(frozen=True)
class Family:
    """The entries of a table in one measure, lower is better; ``level`` is a look's, over all pairs of one entry.

    ``values`` are (entries, seeds, groups), infinite where a run diverged, ``untouched`` (1, groups) or None where it
    was not scored; ``entries`` counts those that were dropped too; ``pools`` are the sizes of entries, by default one.
    """

    names: Sequence[str]
    values: Floats
    untouched: Floats | None
    weights: Floats
    is_share: bool
    level: float
    entries: int
    pools: Sequence[int] = ()

    @property
    def of_pair(self) -> float:
        """The level of one pair."""
        return self.level / max(1, self.entries - 1)

    def diverged(self, name: str) -> bool:
        return not np.isfinite(self._of(name)).all()

    def mean(self, name: str) -> float:
        own = self._of(name)
        return float(own.sum() / len(own) / self.weights.sum())

    def spread(self, name: str) -> float:
        """The standard deviation over seeds."""
        of_seed = self._of(name).sum(axis=-1) / self.weights.sum()
        return float(of_seed.std(ddof=1)) if len(of_seed) > 1 and np.isfinite(of_seed).all() else 0.0

    def upper(self, name: str, other: str | None, tolerance: float = 0.0, rounds: float | None = None) -> float:
        """How much worse than ``other``, or than the base model, an entry is at most, or would be found after so
        many rounds; infinite where nothing bounds it."""
        if self.diverged(name) or (other is not None and self.diverged(other)):
            return math.inf if self.diverged(name) else -math.inf
        found = self._estimate(name, other, tolerance)
        seeds = self.values.shape[-2]
        return (
            math.inf if found is None else float((found.after(rounds, seeds) if rounds else found).upper(self.of_pair))
        )

    def lower(self, name: str, other: str | None) -> float:
        """How much worse it is at least."""
        found = None if self.diverged(name) else self._estimate(name, other, 0.0)
        return -math.inf if found is None else float(found.lower(self.of_pair))

    def between(self, name: str, other: str) -> tuple[float, float]:
        """How much worse than another it is at least and at most."""
        return -self.upper(other, name), self.upper(name, other)

    def worst(self, name: str, tolerance: float = 0.0, rounds: float | None = None) -> float:
        """The largest of its bounds against each other entry."""
        bounds = (self.upper(name, other, tolerance, rounds) for other in self.names if other != name)
        return max(bounds, default=-math.inf)

    def suffices(self, name: str, tolerance: float, rounds: float | None = None) -> bool:
        """Whether it keeps 1 − ``tolerance`` of what each other gained, and gained."""
        return self.upper(name, None, rounds=rounds) < 0 and self.worst(name, tolerance, rounds) < 0

    def hurt(self) -> bool:
        """Whether every entry is worse than the base model."""
        return all(self.lower(name, None) > 0 for name in self.names)

    def kept(self, name: str, tolerance: float) -> float:
        """The share of what each other gained that it keeps at least: 1 − τ where its largest bound is 0."""
        low, high = -1.0, tolerance
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.worst(name, middle) < 0 else (middle, high)
        return 1 - high

    def _of(self, name: str) -> Floats:
        return np.asarray(self.values[list(self.names).index(name)])

    def _estimate(self, name: str, other: str | None, tolerance: float) -> Estimate | None:
        _, seeds, groups = self.values.shape
        if min(seeds, groups) < 2 or (self.untouched is None and (other is None or tolerance)):
            return None
        untouched = np.zeros((1, groups)) if self.untouched is None else self.untouched
        of, against = (None if each is None else list(self.names).index(each) for each in (name, other))
        assert of is not None
        return contrast(self.values, untouched, self.weights, of, against, 1 - tolerance, self.is_share, self.pools)
