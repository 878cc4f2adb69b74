"""VICRegL: VICReg of whole images, and of matched patches.

Source: Bardes, Ponce, LeCun, "VICRegL: Self-Supervised Learning of Local Visual Features", NeurIPS 2022
(arXiv 2210.01571), section 3; the authors' code (facebookresearch/VICRegL, `main_vicregl.py`) for the constants and
for what the paper leaves open. With its `fast_vc_reg`: variance and covariance are those of all patches of a view, at
each place of its grid over the batch. Without its `l2_all_matches`: the nearest pairs of either kind count, as in the
paper. Deviations: a mean over pairs of views and over views, of which that code keeps the last one alone; and the
number of matches follows the view that is matched, large or small, not its turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from .global_batch import global_samples, global_size, global_sum
from .objective import Objective, Terms, mean_over_pairs
from .vicreg_expander import VicRegExpander
from .vicreg_loss import vicreg_loss
from .vicreg_statistics import full_precision

MOST_DISTANCES = 2**24  # at a time: a batch of large grids has billions


class Patches(NamedTuple):
    """One view's: embeddings `(batch, patches, dimensions)` and centres `(batch, patches, 2)` in the image."""

    embeddings: torch.Tensor
    centres: torch.Tensor


def nearest(distances: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patches whose nearest one is nearest, and that one, both `(batch, count)`; fewer if there are fewer.

    Args:
        distances: `(batch, patches, candidates)`.
        count: How many patches, of each image.
    """
    closest = distances.min(2)
    chosen = closest.values.topk(min(count, distances.shape[1]), dim=1, largest=False, sorted=False).indices
    return chosen, closest.indices.gather(1, chosen)


def matched_distance(one: Patches, other: Patches, count: int, *, by: str) -> torch.Tensor:
    """Return `sum_pairs |z - z'|^2 / (pairs an image * dimensions)` of this process's images.

    Args:
        one: Patches that are matched.
        other: Patches that they are matched with.
        count: How many of an image's patches are: those that have the nearest match.
        by: What is near: "embeddings", what they look like, or "centres", where they lie.
    """
    own, candidates = getattr(one, by), getattr(other, by)
    at_once = max(1, MOST_DISTANCES // (own.shape[1] * candidates.shape[1]))
    with torch.no_grad():  # in full precision even where a product would be faster: near ones decide
        exact = "donot_use_mm_for_euclid_dist"
        parts = [
            nearest(torch.cdist(*pair, compute_mode=exact), count)
            for pair in zip(own.split(at_once), candidates.split(at_once), strict=True)
        ]
    chosen, found = (torch.cat(indices) for indices in zip(*parts, strict=True))
    difference = _picked(one.embeddings, chosen) - _picked(other.embeddings, found)
    return difference.square().sum() / (difference.shape[1] * difference.shape[2])


def map_statistics(
    maps: torch.Tensor, gamma: float, eps: float, process_group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return variance and covariance of a view's patches: VICReg's at each place over the global batch; their means.

    Args:
        maps: `(batch, patches, dimensions)`, this process's share of at least 2 images.
        gamma: Target of the standard deviation.
        eps: Added to the variance under the root.
        process_group: Processes that hold the rest, in equal shares.
    """
    num_samples, dimensions = global_size(maps, process_group), maps.shape[2]
    everyone = global_samples(maps, process_group)
    mean = everyone.mean(0)
    own, centred = maps - mean, everyone - mean
    variance = global_sum(own.square().sum(0), process_group) / (num_samples - 1)  # (patches, dimensions)
    with full_precision():  # the sum of squares of a covariance is that of the Gram matrix
        gram = torch.einsum("npd,mpd->pnm", own, centred)
    squares = global_sum(gram.square().sum((1, 2)), process_group) / (num_samples - 1) ** 2
    covariance = (squares - variance.square().sum(1)) / dimensions
    return (gamma - (variance + eps).sqrt()).relu().mean(), covariance.mean()


class VicRegL(Objective):
    """`alpha` times VICReg of the pooled features and `1 - alpha` times that of the patches, with the same weights."""

    name = "vicregl"
    defaults = {  # noqa: RUF012  constants
        "alpha": 0.75,
        "num_matches": [20, 4],
        "local_expander_sizes": [512, 512, 512],
    }
    needs_tokens = True
    sees_shifts = False
    further_per_view = 2

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        self.local_expander = VicRegExpander(
            expander.in_features, self.settings["local_expander_sizes"], config.expander_norm
        )
        self.config = config

    @classmethod
    def check(cls, settings, config):
        if not 0 <= settings["alpha"] <= 1:
            raise ValueError(f"`alpha`: expected a number from 0 to 1, got {settings['alpha']}.")
        if len(settings["num_matches"]) != 2 or min(settings["num_matches"]) < 1:
            raise ValueError(
                f"`num_matches`: expected two numbers of at least 1, of large and small views, got "
                f"{settings['num_matches']}."
            )
        if not settings["local_expander_sizes"] or min(settings["local_expander_sizes"]) < 1:
            raise ValueError("`local_expander_sizes`: expected at least one positive width.")
        if config.second_encoder is not None:
            raise ValueError("`second_encoder`: expected none with vicregl, whose patches are of one encoder.")
        for name in ("variance_weight", "covariance_weight"):
            if not isinstance(getattr(config, name), int | float):
                raise ValueError(f"`{name}`: expected one number with vicregl, got one for each view.")
        if config.convention not in ("official", "vicregl"):  # the first is the default, and stands for none given
            raise ValueError(f"`convention`: expected 'vicregl' with vicregl, got {config.convention!r}.")

    def further(self, views):
        tokens, centres = [], []
        for view in views:
            if view.geometry is None:
                raise ValueError("`geometry`: expected where the views were cut out, got none.")
            tokens.append(view.tokens.flatten(1, 2))
            centres.append(centres_in_image(view.geometry, view.tokens.shape[1], view.tokens.shape[2]))
        return [*tokens, *centres]

    def forward(self, embeddings, further, process_group):
        config, count = self.config, len(embeddings)
        weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)
        whole = vicreg_loss(
            *embeddings[:2],
            local_views=embeddings[2:],
            invariance_weight=weights[0],
            variance_weight=weights[1],
            covariance_weight=weights[2],
            gamma=config.gamma,
            eps=config.eps,
            convention="vicregl",
            process_group=process_group,
            equal_shares=self.shares_are_equal,
        )
        views = [
            Patches(self._local(tokens.flatten(0, 1), process_group).unflatten(0, tokens.shape[:2]), centres)
            for tokens, centres in zip(further[:count], further[count:], strict=True)
        ]
        local = self._local_terms(views, process_group)
        local_loss = sum(weight * term for weight, term in zip(weights, local, strict=True))
        alpha = self.settings["alpha"]
        parts = {"invariance": whole.invariance, "variance": whole.variance, "covariance": whole.covariance}
        parts |= dict(zip(("local_invariance", "local_variance", "local_covariance"), local, strict=True))
        return Terms(alpha * whole.loss + (1 - alpha) * local_loss, parts)

    def _local(self, tokens: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Embeddings of patches, in float32 at least also where the weights are not."""
        found = self.local_expander(tokens, group)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _local_terms(
        self, views: Sequence[Patches], group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Invariance by both ways of matching, variance and covariance, in the units of `vicreg_loss`."""
        large, small = self.settings["num_matches"]

        def distance_of(one: int, other: int) -> list[torch.Tensor]:
            either = [
                matched_distance(views[first], views[second], large if first < 2 else small, by=by)
                for first, second in ((one, other), (other, one))
                for by in ("embeddings", "centres")
            ]
            return [torch.stack(either).sum() / 2]

        (distance,) = mean_over_pairs(len(views), distance_of)
        invariance = global_sum(distance, group) / global_size(views[0].embeddings, group)
        found = [map_statistics(one.embeddings, self.config.gamma, self.config.eps, group) for one in views]
        variance, covariance = (torch.stack(terms).mean() for terms in zip(*found, strict=True))
        return invariance, variance, covariance


def centres_in_image(geometry: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return where the patches of a view have their centres in the image, `(batch, rows * columns, 2)` as (x, y).

    Args:
        geometry: `(batch, 6)`, of `objective.View`.
        rows: Of patches; they are taken to cover the view.
        columns: The same.
    """
    y = (torch.arange(rows, device=geometry.device, dtype=geometry.dtype) + 0.5) / rows
    x = (torch.arange(columns, device=geometry.device, dtype=geometry.dtype) + 0.5) / columns
    places = torch.stack([*torch.meshgrid(y, x, indexing="ij")[::-1], geometry.new_ones(rows, columns)], dim=-1)
    return torch.einsum("bij,pj->bpi", geometry.unflatten(1, (2, 3)), places.flatten(0, 1))


def _picked(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, indices[..., None].expand(-1, -1, rows.shape[2]))


__all__ = ["Patches", "VicRegL", "map_statistics", "matched_distance", "nearest"]
