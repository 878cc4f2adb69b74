"""What lies near in feature space: k-NN (do the nearest share a class?), retrieval (do relatives come first?)."""

import math
from collections.abc import Iterator, Sequence

import torch

from hf_vicreg.training.evaluation.exact_cosine import exact_cosines

TEMPERATURE = 0.07
VOTE = 2**40  # of the nearest neighbour


def knn_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    neighbours: int = 20,
    temperature: float = TEMPERATURE,
) -> float:
    """Return the accuracy of weighted k-NN by cosine similarity.

    Each of the k nearest votes for its class with weight `exp(similarity / temperature)`. Of neighbours that are as
    near as each other the earlier in the bank counts, of classes with as many votes the lower: nothing hangs on how a
    processor rounds.
    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.

    Args:
        bank: `(images, features)` features of labelled images.
        bank_labels: `(images,)` int64.
        queries: `(queries, features)`.
        query_labels: `(queries,)` int64.
        neighbours: k; all of the bank if it is smaller.
        temperature: Of the weights.
    """
    (found,) = knn_predictions(
        bank, bank_labels, queries, neighbours=[min(neighbours, len(bank))], temperature=temperature
    ).values()
    return float((found == query_labels).double().mean())


def knn_predictions(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, torch.Tensor]:
    """Return the classes `(queries,)` that weighted k-NN finds, for each k; arguments as for `knn_accuracy`.

    Each k is at most the size of the bank.
    """
    classes = int(bank_labels.max()) + 1
    found: dict[int, list[torch.Tensor]] = {k: [] for k in neighbours}
    for similarity, nearest in nearest_in_bank(bank, queries, max(neighbours)):
        # whole numbers: a sum of votes is the same in any order, and equal votes are equal
        weights = (((similarity - similarity[:, :1]) / temperature).exp() * VOTE).round().long()
        voted = bank_labels[nearest]
        for k, parts in found.items():
            votes = torch.zeros(len(nearest), classes, dtype=torch.int64, device=bank.device)
            parts.append(votes.scatter_add_(1, voted[:, :k], weights[:, :k]).argmax(1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def votes_of(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    neighbours: int,
    temperature: float,
    classes: int,
) -> torch.Tensor:
    """Return the share of the votes of weighted k-NN that each class has, `(queries, classes)` float64.

    Args:
        bank: `(images, features)`.
        bank_labels: `(images,)` int64.
        queries: `(queries, features)`.
        neighbours: k, at most the size of the bank.
        temperature: Of the weights.
        classes: How many there are.
    """
    found = []
    for similarity, nearest in nearest_in_bank(bank, queries, neighbours):
        weights = (((similarity - similarity[:, :1]) / temperature).exp() * VOTE).round().long()
        votes = torch.zeros(len(nearest), classes, dtype=torch.int64, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], weights)
        found.append(votes.double() / votes.sum(1, keepdim=True))
    return torch.cat(found)


def nearest_in_bank(
    bank: torch.Tensor, queries: torch.Tensor, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield exact cosines and places in the bank, both `(some queries, count)`, nearest first, equals by place."""
    for _, cosines in exact_cosines(bank, queries):
        found = cosines.topk(count, dim=1)
        nearest = found.indices.sort(dim=1).values
        # more images than there is room for are as near as the last one: which of them topk takes is left to chance
        crowded = ((cosines >= found.values[:, -1:]).sum(1) > count).nonzero().flatten()
        if len(crowded):
            nearest[crowded] = cosines[crowded].argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        similarity, order = cosines.gather(1, nearest).sort(dim=1, descending=True, stable=True)
        yield similarity, nearest.gather(1, order)


def mean_average_precision(
    gallery: torch.Tensor, gallery_labels: torch.Tensor, queries: torch.Tensor, query_labels: torch.Tensor
) -> tuple[float, int]:
    """Return the mean average precision of ranking the whole gallery by cosine similarity, and the queries counted.

    Relevant are the gallery's images of the query's class. A query without any is left out. Images that are as near as
    each other are ranked in the gallery's order. The average precision of a
    query is the mean of precision@rank over the ranks of the relevant images.
    Source: Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, section 8.4.

    Args:
        gallery: `(images, features)`.
        gallery_labels: `(images,)` int64.
        queries: `(queries, features)`.
        query_labels: `(queries,)` int64.
    """
    ranks = torch.arange(1, len(gallery) + 1, dtype=torch.float64)
    found: list[float] = []
    for some, cosines in exact_cosines(gallery, queries):
        order = cosines.argsort(dim=1, descending=True, stable=True)
        relevant = (gallery_labels[order] == query_labels[some, None]).double()
        count = relevant.sum(1)
        precisions = (relevant.cumsum(1) / ranks * relevant).sum(1)
        found += (precisions[count > 0] / count[count > 0]).tolist()
    return math.fsum(found) / max(1, len(found)), len(found)
