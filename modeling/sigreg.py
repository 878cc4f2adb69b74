"""LeJEPA: views predict their mean, and embeddings are an isotropic Gaussian; no teacher, no predictor, no negatives.

Source: Balestriero and LeCun, "LeJEPA" (arXiv 2511.08544), SIGReg and the prediction loss; the authors' code
(rbalestr-lab/lejepa, `EppsPulley`, `SlicingUnivariateTest`, `MINIMAL.md`) for the quadrature.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .global_batch import global_size, global_sum
from .objective import Objective, Terms, require
from .vicreg_statistics import full_precision

NUM_KNOTS, LAST_KNOT = 17, 3.0  # of the trapezoidal rule, as in the authors' code


def random_slices(dimensions: int, count: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    """Return unit vectors `(dimensions, count)`, the same for a seed, on a tensor's device and of its type."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    slices = torch.randn(dimensions, count, generator=generator, device=like.device, dtype=like.dtype)
    return slices / slices.norm(dim=0)


def epps_pulley(samples: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return how far each of several samples is from N(0, 1), `(count,)`, 0 for none.

    With the empirical characteristic function phi_N of N numbers, phi that of N(0, 1), which is `exp(-t^2 / 2)`:
    `N * integral |phi_N(t) - phi(t)|^2 phi(t) dt` from -3 to 3, by the trapezoidal rule on the symmetric half.

    Args:
        samples: `(batch, count)`, this process's share of the N numbers of each sample.
        process_group: Processes that hold the rest, in equal shares.
    """
    num_samples = global_size(samples, process_group)
    knots = torch.linspace(0, LAST_KNOT, NUM_KNOTS, dtype=samples.dtype, device=samples.device)
    normal = (-knots.square() / 2).exp()
    step = LAST_KNOT / (NUM_KNOTS - 1)
    weights = torch.full_like(knots, 2 * step)
    weights[0] = weights[-1] = step
    angles = samples[..., None] * knots
    sums = torch.stack([angles.cos().sum(0), angles.sin().sum(0)])
    cosine, sine = (global_sum(sums, process_group) / num_samples).unbind()
    return ((cosine - normal).square() + sine.square()) @ (weights * normal) * num_samples


def prediction_loss(views: Sequence[torch.Tensor], process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the mean square, over the global batch, dimensions and views, of a view less the mean of the global two.

    Args:
        views: `(batch, dimensions)` each, this process's share; the two global ones come first.
        process_group: Processes that hold the rest, in equal shares.
    """
    centre = (views[0] + views[1]) / 2
    total = torch.stack([(centre - one).square().sum() for one in views]).sum()
    return global_sum(total, process_group) / (global_size(centre, process_group) * centre.shape[1] * len(views))


class SIGReg(Objective):
    """`(1 - weight) prediction + weight sketch`, the sketch a mean over views and random directions."""

    name = "sigreg"
    defaults = {"sketch_weight": 0.05, "num_slices": 1024}  # noqa: RUF012  constants

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        self.seed = 0  # of the slices: those of a step are the same on every process, and in a resumed run

    @classmethod
    def check(cls, settings, config):
        require(settings, "num_slices", least=1)
        if not 0 <= settings["sketch_weight"] <= 1:
            raise ValueError(f"`sketch_weight`: expected a number from 0 to 1, got {settings['sketch_weight']}.")

    def begin_step(self, model, step, num_steps):
        self.seed = step

    def forward(self, embeddings, further, process_group):
        weight, slices = self.settings["sketch_weight"], self.settings["num_slices"]
        directions = random_slices(embeddings[0].shape[1], slices, self.seed, embeddings[0])
        with full_precision():
            distances = [epps_pulley(one @ directions, process_group).mean() for one in embeddings]
        sketch = torch.stack(distances).mean()
        prediction = prediction_loss(embeddings, process_group)
        return Terms((1 - weight) * prediction + weight * sketch, {"prediction": prediction, "sketch": sketch})


__all__ = ["SIGReg", "epps_pulley", "prediction_loss", "random_slices"]
