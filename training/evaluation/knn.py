"""k-NN accuracy: how often an image's nearest neighbours in feature space share its class."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import pooled_features
from hf_vicreg.training.sources import ImageSource

TEMPERATURE = 0.07
BATCH_SIZE = 256


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

    Each of the k nearest votes for its class with weight `exp(similarity / temperature)`.
    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.

    Args:
        bank: `(images, features)` features of labelled images.
        bank_labels: `(images,)` int64.
        queries: `(queries, features)`.
        query_labels: `(queries,)` int64.
        neighbours: k; all of the bank if it is smaller.
        temperature: Of the weights.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = 0
    for some, truth in zip(queries.split(1024), query_labels.split(1024), strict=True):
        similarity, nearest = (some @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = torch.zeros(len(some), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(queries)


@torch.no_grad()
def encode(
    source: ImageSource,
    processor: Callable[..., Any],
    encode_pixels: Callable[[torch.Tensor], torch.Tensor],
    *,
    share: tuple[int, int] = (0, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and labels of a labelled source's readable images, in its order, on the CPU.

    Args:
        source: Images with labels.
        processor: Turns a list of images into `pixel_values`.
        encode_pixels: `(batch, channels, height, width)` to `(batch, features)`.
        share: (rank, processes): every how-manieth image, and from which on, this call encodes.

    Returns:
        `(images, features)` float32 and `(images,)` int64.
    """
    assert source.labels is not None
    features, labels = [torch.empty(0, 0)], []
    indices = list(range(share[0], len(source), share[1]))
    for start in range(0, len(indices), BATCH_SIZE):
        read = [(source.read(index), source.labels[index]) for index in indices[start : start + BATCH_SIZE]]
        images: list[Image.Image] = [image for image, _ in read if image is not None]
        if images:
            pixel_values = processor(images, return_tensors="pt")["pixel_values"]
            features.append(encode_pixels(pixel_values).float().cpu())
            labels += [label for image, label in read if image is not None]
    return torch.cat(features[1:] or features), torch.tensor(labels, dtype=torch.int64)


def model_encoder(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values to the pooled features of any vision encoder, in evaluation mode."""

    def encode_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
        was_training = model.training
        model.eval()
        features = pooled_features(model(pixel_values.to(model.device)))
        model.train(was_training)
        return features

    return encode_pixels
