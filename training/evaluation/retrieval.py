"""Retrieval: are an image's relatives ranked before all others?"""

import math

import torch

from hf_vicreg.training.evaluation.exact_cosine import exact_cosines


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
