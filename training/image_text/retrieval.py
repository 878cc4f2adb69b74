"""How well images and captions find each other, and class names find images: figures of embeddings alone."""

import math
from collections.abc import Sequence

import torch

from hf_vicreg.training.evaluation.exact_cosine import exact_cosines, on_grid

RECALLS = (1, 5, 10)


def retrieval_figures(images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor) -> dict[str, float]:
    """Return recall at 1, 5 and 10 and the median rank, both ways, by cosine.

    From image to text, an image's rank is that of the best of its own captions among those of others; from text to
    image, a caption's is that of its image among all images. What is as near as the right one counts as nearer: an
    encoder that makes one point of everything finds nothing.
    Source: Karpathy and Fei-Fei 2014 (arXiv 1412.2306), section 4.1, for the two recalls and the median rank.

    Args:
        images: `(images, dimensions)`.
        texts: `(texts, dimensions)`.
        owners: `(texts,)` int64, the image of each caption; every image has one at least.
    """
    found = {}
    for name, ranks in (
        ("image_to_text", _ranks(images, texts, torch.arange(len(images)), owners)),
        ("text_to_image", _ranks(texts, images, owners, torch.arange(len(images)))),
    ):
        for count in RECALLS:
            found[f"{name}_recall_{count}"] = (ranks <= count).double().mean().item()
        found[f"{name}_median_rank"] = ranks.double().quantile(0.5).item()
    return found


def _ranks(
    queries: torch.Tensor, bank: torch.Tensor, query_owners: torch.Tensor, bank_owners: torch.Tensor
) -> torch.Tensor:
    ranks = []
    for some, cosines in exact_cosines(bank, queries):
        own = query_owners[some][:, None] == bank_owners
        best = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((cosines >= best) & ~own).sum(1))
    return torch.cat(ranks)


def chance(num_images: int, num_texts: int) -> dict[str, float]:
    """Return recall at 10 of a blind search, where every image has as many captions as the others."""
    drawn = min(RECALLS[-1], num_texts)
    none_right = math.comb(num_texts - round(num_texts / num_images), drawn) / math.comb(num_texts, drawn)
    return {
        "image_to_text_recall_10": 1 - none_right,
        "text_to_image_recall_10": min(1.0, RECALLS[-1] / num_images),
    }


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
