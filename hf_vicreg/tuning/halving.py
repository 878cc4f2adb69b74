"""Successive halving as numbers: what is drawn, how many go on, who they are. Imports nothing heavy.

Source: Jamieson and Talwalkar, AISTATS 2016 (arXiv 1502.07943), algorithm 1: each round has the same share of the
budget, and half as many trials as the round before.
"""

import math
import random
from collections.abc import Mapping, Sequence

WIDE = 4.0  # a range whose ends are further apart is drawn from on a logarithmic scale

Range = tuple[float, float]


def counts_of(trials: int) -> list[int]:
    """Return how many trials each round has: half of those before, until two are compared."""
    counts = [trials]
    while counts[-1] > 2:
        counts.append(math.ceil(counts[-1] / 2))
    return counts


def drawn(space: Mapping[str, Range], first: Mapping[str, float], count: int, seed: int) -> list[dict[str, float]]:
    """Return the values of each trial: `first`, then others that share each range out evenly between them.

    Args:
        space: Lowest and highest value by name.
        first: What would be trained without tuning.
        count: Of trials.
        seed: Of the draws.
    """
    others = count - 1
    columns = {}
    for name, (low, high) in space.items():
        draws = random.Random(f"{seed}/{name}")
        strata = draws.sample(range(others), others)  # a Latin hypercube: one draw in each of as many parts
        columns[name] = [_at(low, high, (part + draws.random()) / others) for part in strata]
    return [dict(first), *({name: values[at] for name, values in columns.items()} for at in range(others))]


def _at(low: float, high: float, share: float) -> float:
    logarithmic = low > 0 and high > WIDE * low
    value = low * (high / low) ** share if logarithmic else low + (high - low) * share
    return float(f"{value:.3g}")


def best_of(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the numbers of the `count` highest scores, best first, of equal ones the lowest number; none of NaN."""
    found = [number for number, score in scores.items() if not math.isnan(score)]
    return sorted(found, key=lambda number: (-scores[number], number))[:count]


def steps_for(seconds: float, counts: Sequence[int], *, step_seconds: float, other_seconds: float) -> int:
    """Return the steps of each trial of the round that begins.

    Args:
        seconds: That are left for this round and those that follow.
        counts: Of trials, of this round and those that follow.
        step_seconds: Of a step.
        other_seconds: Of a trial beside its steps: start, measuring, export.
    """
    each = seconds / len(counts) / counts[0]
    return max(0, int((each - other_seconds) / step_seconds))


__all__ = ["best_of", "counts_of", "drawn", "steps_for"]
