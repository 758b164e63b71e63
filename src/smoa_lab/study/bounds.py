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

*pooled* is the mean variance over seeds of all entries, with Σ (n − 1) degrees, *own* that of the pair. Where the
pair's exceeds the others' by F's 90 % point, one wild entry may be its cause, and the pair has Welch's degrees, which
are as few as that one's. Where the pooled variance has two degrees or fewer, as with two seeds of two entries,
Satterthwaite's are too many where these agree by chance; then t is the mean of both parts' own, weighted by their
variances (Cochran and Cox, 1950). V is part of how seeds differ, and is not counted twice. For shares of right answers
v_R has one group more, which lies a whole answer off (+ 1 / W²): ten groups without an error don't show that there are
none.

studies/calibration.py measures how often the bounds miss, and from which levels a study as a whole errs in 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtri, stdtrit

Floats = NDArray[np.float64]
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.0384, 0.0226, 0.0124, 0.0103, 0.00853, 0.00772, 0.00703),
    2: (0.043, 0.0231, 0.0167, 0.0137, 0.0119, 0.0108, 0.01),
    3: (0.0432, 0.0247, 0.0196, 0.0164, 0.0142, 0.0128, 0.0113),
    4: (0.0541, 0.0293, 0.0217, 0.0178, 0.0156, 0.0142, 0.0129),
    5: (0.0554, 0.0332, 0.0247, 0.0207, 0.0175, 0.0157, 0.0145),
    6: (0.0622, 0.0365, 0.027, 0.0224, 0.0189, 0.0169, 0.0155),
}
"""The level of a planned look, by the number of entries, for 2, 3, 4 and more planned rounds: by it all looks together
err in 4 %, as `python studies/calibration.py levels` found."""
LATER = 0.01
"""What all looks beyond the plan together err in at most."""
WILD = 0.9
"""The point of F's distribution beyond which a pair's variance is its own; of two entries, the larger variance is
compared with the smaller, either of which may be the wild one."""
FEW = 2
"""Degrees of freedom of the pooled variance up to which each part has its own t."""


def looks(entries: int, planned: int, rounds: int, added: int = 0) -> list[tuple[int, float]]:
    """The rounds after which so many entries are compared, and the level of each look over all pairs of one entry.

    Each planned round from the second on is looked at, at a constant level. A look at a further round takes half of
    what is left of :data:`LATER`. An entry that was ``added`` takes such an unplanned look too, the first or a later
    one: the planned ones are spent by then, and entries are compared after the last planned round at the earliest.
    """
    of_rounds = LEVELS[min(entries, max(LEVELS))]
    longest = len(of_rounds) + 1
    level = of_rounds[min(max(planned, 2), longest) - 2] * min(1.0, longest / max(planned, 1))
    in_plan = [] if added else [(number, level) for number in range(2, planned + 1)]
    first = max(2, planned if added else planned + 1)
    return in_plan + [(number, LATER / 2 ** (number - planned + added)) for number in range(first, rounds + 1)]


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
        """θ is below it in as many."""
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
    values: Floats, untouched: Floats, weights: Floats, of: int, other: int | None, kept: float, is_share: bool = False
) -> Estimate:
    """θ of two entries, or of one and the base model where ``other`` is None.

    ``values`` are (..., entries, seeds, groups), ``untouched`` (..., 1 or seeds, groups), ``weights`` (groups,), and
    ``kept`` is 1 − τ. There are two seeds and two groups or more. An entry with values that aren't finite has no
    variance.
    """
    seeds, total = values.shape[-2], weights.sum()
    if other is None:
        gaps = values[..., of, :, :] - untouched
    else:
        gaps = values[..., of, :, :] - kept * values[..., other, :, :]
        gaps = gaps - (1 - kept) * untouched if kept != 1 else gaps
    of_seed = gaps.sum(axis=-1) / total
    mean = of_seed.mean(axis=-1)
    around = gaps.mean(axis=-2) - weights * mean[..., None]
    apart = gaps - weights * of_seed[..., None]
    part = weights / total
    of_rows = (around**2 / (1 - part)).sum(axis=-1) - apart.var(axis=-2, ddof=1).sum(axis=-1) / seeds
    of_rows = (np.maximum(0.0, of_rows) + is_share) / total**2
    drawn = part**2 / (1 - part)
    rows_freedom = 1 / float((part**2).sum() + drawn.sum() ** 2 - (drawn**2).sum())
    with np.errstate(invalid="ignore"):
        variances = (values.sum(axis=-1) / total).var(axis=-1, ddof=1)
    of_seeds, freedom, pool = _of_seeds(variances, seeds, of, other, kept)
    return Estimate(mean, of_rows, rows_freedom, of_seeds, freedom, pool <= FEW)


def _of_seeds(variances: Floats, seeds: int, of: int, other: int | None, kept: float) -> tuple[Floats, Floats, Floats]:
    """v_S and its degrees of freedom, of a pair or of one entry, and those of the pool; ``variances`` (..., entries)
    are over seeds."""
    entries = range(variances.shape[-1])
    pair, shares = ([of], np.ones(1)) if other is None else ([of, other], np.array([1.0, kept**2]))
    pooled, known = _mean_of(variances, entries)
    spread = variances[..., pair]
    own = (shares * spread).sum(axis=-1) / shares.sum()
    others, others_known = _mean_of(variances, [entry for entry in entries if entry not in pair])
    has_others = others_known > 0  # without others, the larger variance against the smaller
    compared = np.where(has_others, own, spread.max(axis=-1))
    others = np.where(has_others, others, spread.min(axis=-1))
    own_freedom = (seeds - 1) * np.where(has_others, len(pair), 1)
    wild = np.where(has_others, WILD, (1 + WILD) / 2)
    point = fdtri(own_freedom, np.maximum(1, others_known) * (seeds - 1), wild)
    is_wild = (has_others | (len(pair) == 2)) & (compared > point * others)
    parts = ((shares * spread) ** 2).sum(axis=-1)
    welch = np.divide((shares * spread).sum(axis=-1) ** 2, parts, where=parts > 0, out=np.ones_like(parts))
    freedom = np.where(is_wild, welch, known)
    return shares.sum() * np.maximum(pooled, own) / seeds, freedom * (seeds - 1), known * (seeds - 1)


def _mean_of(variances: Floats, which: Sequence[int]) -> tuple[Floats, Floats]:
    """The mean of the finite ones among them, and how many these are."""
    own = variances[..., list(which)]
    is_known = np.isfinite(own)
    counts = is_known.sum(axis=-1)
    return np.where(is_known, own, 0.0).sum(axis=-1) / np.maximum(1, counts), counts.astype(float)


@dataclass(frozen=True)
class Family:
    """The entries of a table in one measure, lower is better; ``level`` is that of one pair.

    ``values`` are (entries, seeds, groups), infinite where a run diverged, ``untouched`` (1, groups).
    """

    names: Sequence[str]
    values: Floats
    untouched: Floats
    weights: Floats
    is_share: bool
    level: float

    def of_seeds(self, name: str) -> Floats:
        """An entry's mean in each seed."""
        return np.asarray(self.values[list(self.names).index(name)].sum(axis=-1) / self.weights.sum())

    def diverged(self, name: str) -> bool:
        return not np.isfinite(self.of_seeds(name)).all()

    def upper(self, name: str, other: str | None, tolerance: float = 0.0, rounds: float | None = None) -> float:
        """How much worse than ``other``, or than the base model, an entry is at most, or would be found after so
        many rounds; infinite where nothing bounds it."""
        if self.diverged(name) or (other is not None and self.diverged(other)):
            return math.inf if self.diverged(name) else -math.inf
        found, seeds = self._estimate(name, other, tolerance), self.values.shape[-2]
        if found is None:
            return math.inf
        return float((found.after(rounds, seeds) if rounds else found).upper(self.level))

    def lower(self, name: str, other: str | None) -> float:
        """How much worse it is at least."""
        if other is not None:
            return -self.upper(other, name)
        found = None if self.diverged(name) else self._estimate(name, None, 0.0)
        return -math.inf if found is None else float(found.lower(self.level))

    def worst(self, name: str, tolerance: float = 0.0, rounds: float | None = None) -> float:
        """The largest of its bounds against each other entry."""
        bounds = (self.upper(name, other, tolerance, rounds) for other in self.names if other != name)
        return max(bounds, default=-math.inf)

    def suffices(self, name: str, tolerance: float, rounds: float | None = None) -> bool:
        """Whether it keeps 1 − ``tolerance`` of what each other gained, and gained."""
        return self.upper(name, None, rounds=rounds) < 0 and self.worst(name, tolerance, rounds) < 0

    def kept(self, name: str, tolerance: float) -> float:
        """The share of what each other gained that it keeps at least: 1 − τ where its largest bound is 0."""
        low, high = -1.0, tolerance
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.worst(name, middle) < 0 else (middle, high)
        return 1 - high

    def _estimate(self, name: str, other: str | None, tolerance: float) -> Estimate | None:
        _, seeds, groups = self.values.shape
        if min(seeds, groups) < 2:
            return None
        of, against = (None if each is None else list(self.names).index(each) for each in (name, other))
        assert of is not None
        return contrast(self.values, self.untouched, self.weights, of, against, 1 - tolerance, self.is_share)
