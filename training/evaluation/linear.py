"""Linear probe: L2-regularised logistic regression on frozen features, its strength from held-out training images."""

import logging
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
MAX_ITERATIONS = 1000
SMALL, SPLITS_OF_SMALL = 5000, 5  # below so many images one held-out part is too noisy to choose by


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe found.

    Attributes:
        predictions: `(test images,)` int64 classes.
        strength: The chosen C.
        held_out: Accuracy on held-out training images for each C tried; empty where none could be held out.
        converged: Whether the final fit converged.
    """

    predictions: torch.Tensor
    strength: float
    held_out: dict[float, float]
    converged: bool


def linear_probe(
    features: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, *, held_out_ratio: float, seed: int
) -> LinearProbe:
    """Fit on the training features and predict the test features, which have no part in any choice.

    Features are standardised by the training images' mean and deviation. C is the one of `STRENGTHS` that is best on a
    stratified held-out part (the mean of five such parts for small sets), and the final fit sees all training images.

    Args:
        features: `(images, features)`.
        labels: `(images,)` int64, at least two classes.
        test_features: `(test images, features)`.
        held_out_ratio: Share of the training images to choose C on.
        seed: Of the held-out parts.

    Raises:
        InputError: scikit-learn is not installed, or one class only.
    """
    require_sklearn()
    if len(labels.unique()) < 2:
        raise InputError(
            "`label_column_name`: expected at least 2 classes among the readable training images, found one."
        )
    probe = fit_linear_probe(features, labels, held_out_ratio=held_out_ratio, seed=seed)
    predictions = torch.from_numpy(probe.model.predict(probe.standardised(test_features)))
    return LinearProbe(predictions, probe.strength, probe.held_out, probe.model.converged)


@dataclass(frozen=True)
class FittedProbe:
    """A linear probe to predict with.

    Attributes:
        model: The regression.
        mean: Of the training features.
        deviation: The same.
        strength: The chosen C.
        held_out: As of `LinearProbe`.
        classes: How many there are, of which the training images need not have all.
    """

    model: "_Regression"
    mean: np.ndarray
    deviation: np.ndarray
    strength: float
    held_out: dict[float, float]
    classes: int

    def standardised(self, features: torch.Tensor) -> np.ndarray:
        """Return features as the regression takes them."""
        return (features.double().numpy() - self.mean) / self.deviation

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Return `(images, classes)` float64 of features `(images, size)`; of a class never seen it is 0."""
        found = self.model.model.predict_proba(self.standardised(features))
        whole = torch.zeros(len(features), self.classes, dtype=torch.float64)
        whole[:, torch.from_numpy(self.model.model.classes_)] = torch.from_numpy(found)
        return whole


def fit_linear_probe(
    features: torch.Tensor, labels: torch.Tensor, *, held_out_ratio: float, seed: int, classes: int = 0
) -> FittedProbe:
    """Fit as `linear_probe` does, of at least two classes."""
    x, y = features.double().numpy(), labels.numpy()
    strength, held_out = _choose(x, y, held_out_ratio, seed)
    mean, deviation = _moments(x)
    model = _Regression(strength)
    model.fit((x - mean) / deviation, y)
    return FittedProbe(model, mean, deviation, strength, held_out, classes or int(y.max()) + 1)


def require_sklearn() -> None:
    """Raise InputError if scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise InputError(
            "`evaluate linear`: needs scikit-learn, which is not installed; pip install 'hf-vicreg[evaluation]'."
        ) from error


def _choose(x: np.ndarray, y: np.ndarray, held_out_ratio: float, seed: int) -> tuple[float, dict[float, float]]:
    """Return the best C and the held-out accuracy of each."""
    from sklearn.model_selection import StratifiedShuffleSplit

    _, counts = np.unique(y, return_counts=True)
    held_out = max(round(held_out_ratio * len(y)), len(counts))  # one of each class at least
    if counts.min() < 2 or len(y) - held_out < len(counts):
        logger.info("C = 1: too few images of a class to hold some out")
        return 1.0, {}
    splits = SPLITS_OF_SMALL if len(y) < SMALL else 1
    parts = list(StratifiedShuffleSplit(splits, test_size=held_out, random_state=seed).split(x, y))
    if any(len(np.unique(y[fit])) < 2 for fit, _ in parts):
        logger.info("C = 1: with so many images held out, the others are of one class")
        return 1.0, {}
    correct = dict.fromkeys(STRENGTHS, 0.0)
    for fit, check in parts:
        mean, deviation = _moments(x[fit])
        model = _Regression(STRENGTHS[0])
        for strength in STRENGTHS:  # from strong to weak regularisation, each starting from the solution before
            model.set_strength(strength)
            model.fit((x[fit] - mean) / deviation, y[fit])
            correct[strength] += float((model.predict((x[check] - mean) / deviation) == y[check]).mean()) / splits
    return max(correct, key=lambda strength: correct[strength]), correct


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    deviation = x.std(0)
    return x.mean(0), np.where(deviation > 0, deviation, 1.0)


class _Regression:
    """scikit-learn's multinomial logistic regression that starts where it stopped and says whether it converged."""

    def __init__(self, strength: float):
        from sklearn.linear_model import LogisticRegression

        self.model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, warm_start=True)
        self.converged = True

    def set_strength(self, strength: float) -> None:
        self.model.set_params(C=strength)

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            self.model.fit(x, y)
        self.converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
        if not self.converged:
            logger.warning("C = %g: no convergence after %d iterations", self.model.C, MAX_ITERATIONS)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model.predict(x)
