"""The weights of VICReg's three parts, and whose parts they are of.

Paper, authors' code and ports weigh the three differently; the same weights mean another objective in each:

| convention | invariance | variance | covariance | source |
| --- | --- | --- | --- | --- |
| `official` | s | (v(Z) + v(Z')) / 2 | c(Z) + c(Z') | facebookresearch/vicreg, `main_vicreg.py` |
| `paper` | D s | v(Z) + v(Z') | c(Z) + c(Z') | equations 5 and 6: squared distances, not their mean over D |
| `solo-learn` | s | v(Z) + v(Z') | c(Z) + c(Z') | vturrisi/solo-learn, `solo/losses/vicreg.py` |
| `vicregl` | s | (v(Z) + v(Z')) / 2 | (c(Z) + c(Z')) / 2 | facebookresearch/VICRegL, `main_vicregl.py` |

s is the mean squared difference of two views, v the variance's hinge and c the covariance's off-diagonal squares, as
`vicreg_loss.py` defines them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Convention = Literal["official", "paper", "solo-learn", "vicregl"]
Weight = float | Sequence[float]


class Factors(NamedTuple):
    """What a convention multiplies the terms s, v(Z) + v(Z') and c(Z) + c(Z') by."""

    invariance: float
    variance: float
    covariance: float


def convert_weights(
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
    *,
    source: Convention,
    target: Convention,
    dimensions: int,
) -> tuple[float, float, float]:
    """Return the weights that make `target` the objective that these weights are in `source`.

    Args:
        invariance_weight: Lambda in `source`.
        variance_weight: Mu in `source`.
        covariance_weight: Nu in `source`.
        source: The convention of the weights.
        target: The convention to translate to.
        dimensions: Width D of the embeddings; the paper's invariance is a sum over them.

    Raises:
        ValueError: An unknown convention.
    """
    given, wanted = convention_factors(source, dimensions), convention_factors(target, dimensions)
    return (
        invariance_weight * given.invariance / wanted.invariance,
        variance_weight * given.variance / wanted.variance,
        covariance_weight * given.covariance / wanted.covariance,
    )


def check_weights(
    invariance_weight: float, variance_weight: Weight, covariance_weight: Weight, gamma: float, eps: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the weights of variance and covariance for each view.

    Raises:
        ValueError: A number below 0 or not a number, or other than one or two weights.
    """
    pairs = []
    for name, weight in (("variance_weight", variance_weight), ("covariance_weight", covariance_weight)):
        pair = tuple(weight) if isinstance(weight, Sequence) else (weight, weight)
        if len(pair) != 2:
            raise ValueError(f"`{name}`: expected a number or one for each of 2 views, got {weight}.")
        pairs.append((pair[0], pair[1]))
    for name, values in (
        ("invariance_weight", (invariance_weight,)),
        ("variance_weight", pairs[0]),
        ("covariance_weight", pairs[1]),
        ("gamma", (gamma,)),
        ("eps", (eps,)),
    ):
        for value in values:
            if not value >= 0:
                raise ValueError(f"`{name}`: expected a number of at least 0, got {value}.")
    return pairs[0], pairs[1]


def convention_factors(convention: str, dimensions: int) -> Factors:
    """Return what a convention multiplies s, v and c by.

    Raises:
        ValueError: An unknown convention.
    """
    factors = {
        "official": Factors(1, 1 / 2, 1),
        "paper": Factors(dimensions, 1, 1),
        "solo-learn": Factors(1, 1, 1),
        "vicregl": Factors(1, 1 / 2, 1 / 2),
    }
    if convention not in factors:
        raise ValueError(f"`convention`: expected one of {', '.join(factors)}, got {convention!r}.")
    return factors[convention]


__all__ = ["Convention", "Factors", "Weight", "check_weights", "convention_factors", "convert_weights"]
