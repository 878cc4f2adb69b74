"""Retrieval: are an image's relatives ranked before all others?"""

import torch
import torch.nn.functional as F


def mean_average_precision(
    gallery: torch.Tensor, gallery_labels: torch.Tensor, queries: torch.Tensor, query_labels: torch.Tensor
) -> tuple[float, int]:
    """Return the mean average precision of ranking the whole gallery by cosine similarity, and the queries counted.

    Relevant are the gallery's images of the query's class. A query without any is left out. The average precision of a
    query is the mean of precision@rank over the ranks of the relevant images.
    Source: Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, section 8.4.

    Args:
        gallery: `(images, features)`.
        gallery_labels: `(images,)` int64.
        queries: `(queries, features)`.
        query_labels: `(queries,)` int64.
    """
    gallery, queries = F.normalize(gallery.float(), dim=1), F.normalize(queries.float(), dim=1)
    ranks = torch.arange(1, len(gallery) + 1, dtype=torch.float64)
    total, counted = 0.0, 0
    for some, labels in zip(queries.split(256), query_labels.split(256), strict=True):
        order = (some @ gallery.T).argsort(dim=1, descending=True, stable=True)
        relevant = (gallery_labels[order] == labels[:, None]).double()
        found = relevant.sum(1)
        precisions = (relevant.cumsum(1) / ranks * relevant).sum(1)
        total += float((precisions[found > 0] / found[found > 0]).sum())
        counted += int((found > 0).sum())
    return total / max(1, counted), counted
