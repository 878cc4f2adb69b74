"""How well images and captions find each other, and class names find images: figures of embeddings alone."""

import math
from collections.abc import Sequence

import torch

from hf_vicreg.training.evaluation.exact_cosine import exact_cosines, on_grid

RECALLS = (1, 5, 10)


def retrieval_figures(
    images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor, wordings: torch.Tensor | None = None
) -> dict[str, float]:
    """Return recall at 1, 5 and 10 and the median rank, both ways, by cosine.

    From image to text, an image's rank is that of the best of its own captions among those of others; from text to
    image, a caption's is that of the best of its images among the others. A caption that several images have is the
    own one of each. What is as near as the right one counts as nearer: an encoder that makes one point of everything
    finds nothing.
    Source: Karpathy and Fei-Fei 2014 (arXiv 1412.2306), section 4.1, for the two recalls and the median rank.

    Args:
        images: `(images, dimensions)`.
        texts: `(texts, dimensions)`.
        owners: `(texts,)` int64, the image of each caption; every image has one at least.
        wordings: `(texts,)` int64, the same number for the same text (`numbered`); default: all texts differ.
    """
    found, each = {}, torch.arange(len(images))
    wordings = torch.arange(len(owners)) if wordings is None else wordings
    for name, ranks in (
        ("image_to_text", _ranks(images, texts, each, wordings, owners, wordings)),
        ("text_to_image", _ranks(texts, images, wordings, each, wordings, owners)),
    ):
        for count in RECALLS:
            found[f"{name}_recall_{count}"] = (ranks <= count).double().mean().item()
        found[f"{name}_median_rank"] = ranks.double().quantile(0.5).item()
    return found


def numbered(texts: Sequence[str]) -> torch.Tensor:
    """Return a number for each text, `(texts,)` int64, the same one for the same text."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(one, len(known)) for one in texts], dtype=torch.int64)


def _ranks(
    queries: torch.Tensor,
    bank: torch.Tensor,
    query_keys: torch.Tensor,
    bank_keys: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Return the rank of each query's best own row: of those whose keys are joined by `starts` and `ends`."""
    ranks = []
    for some, cosines in exact_cosines(bank, queries):
        keys, places = query_keys[some].unique(return_inverse=True)
        at = torch.searchsorted(keys, starts).clamp(max=len(keys) - 1)
        joined = keys[at] == starts
        reached = torch.zeros(len(keys), int(bank_keys.max()) + 1, dtype=torch.bool)
        reached[at[joined], ends[joined]] = True
        own = reached[places][:, bank_keys]
        best = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((cosines >= best) & ~own).sum(1))
    return torch.cat(ranks)


def chance(num_images: int, owners: torch.Tensor, wordings: torch.Tensor | None = None) -> dict[str, float]:
    """Return recall at 10 of a blind search; arguments as of `retrieval_figures`."""
    wordings = torch.arange(len(owners)) if wordings is None else wordings
    images, words = torch.stack([owners, wordings]).unique(dim=1)
    captions = torch.zeros(num_images, dtype=torch.int64).index_add_(0, images, wordings.bincount()[words])
    return {
        "image_to_text_recall_10": _blind(captions, len(owners)),
        "text_to_image_recall_10": _blind(words.bincount()[wordings], num_images),
    }


def _blind(counts: torch.Tensor, total: int) -> float:
    """Return how likely one of ten that are drawn of `total` is one of so many, the mean over the queries."""
    drawn = min(RECALLS[-1], total)
    missed = {count: math.comb(total - count, drawn) / math.comb(total, drawn) for count in set(counts.tolist())}
    return sum(1 - missed[count] for count in counts.tolist()) / len(counts)


def zero_shot_predictions(images: torch.Tensor, texts: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the class of each image, `(images,)` int64: that whose mean text is nearest by cosine.

    Source: Radford et al. 2021, CLIP (arXiv 2103.00020), section 3.1.4: the mean over templates of unit vectors.

    Args:
        images: `(images, dimensions)`.
        texts: `(classes * templates, dimensions)`, the templates of a class one after the other.
        num_classes: How many.
    """
    means = on_grid(texts).unflatten(0, (num_classes, -1)).mean(1)
    return torch.cat([cosines.argmax(1) for _, cosines in exact_cosines(means, images)])


def prompts(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Return a text for each class and template, in this order; `{}` in a template is the name."""
    return [template.replace("{}", name) for name in class_names for template in templates]
