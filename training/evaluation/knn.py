"""k-NN accuracy: how often an image's nearest neighbours in feature space share its class."""

from collections.abc import Callable, Iterator, Sequence
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
    (found,) = knn_predictions(
        bank, bank_labels, queries, neighbours=[min(neighbours, len(bank))], temperature=temperature
    ).values()
    return float((found == query_labels).float().mean())


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
        weights, voted = (similarity / temperature).exp(), bank_labels[nearest]
        for k, parts in found.items():
            votes = torch.zeros(len(nearest), classes, device=bank.device)
            parts.append(votes.scatter_add_(1, voted[:, :k], weights[:, :k]).argmax(1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def nearest_in_bank(
    bank: torch.Tensor, queries: torch.Tensor, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield cosine similarities and places in the bank, both `(some queries, count)`, nearest first."""
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    for some in queries.split(1024):
        yield (some @ bank.T).topk(count, dim=1)


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
    for _, indices, encoded in encoded_batches(source, processor, encode_pixels, share=share):
        features.append(encoded)
        labels += [source.labels[index] for index in indices]
    return torch.cat(features[1:] or features), torch.tensor(labels, dtype=torch.int64)


@torch.no_grad()
def encoded_batches(
    source: ImageSource,
    processor: Callable[..., Any],
    encode_pixels: Callable[[torch.Tensor], torch.Tensor],
    *,
    share: tuple[int, int] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """Yield batch after batch of a source: where it starts in the share, indices of its readable images, features.

    Arguments are those of `encode`; features are `(readable images, features)` float32 on the CPU.
    """
    indices = range(share[0], len(source), share[1])
    for start in range(0, len(indices), batch_size):
        read = [(index, source.read(index)) for index in indices[start : start + batch_size]]
        readable = [index for index, image in read if image is not None]
        if readable:
            images: list[Image.Image] = [image for _, image in read if image is not None]
            pixel_values = processor(images, return_tensors="pt")["pixel_values"]
            yield start, readable, encode_pixels(pixel_values).float().cpu()


def model_encoder(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values to the pooled features of any vision encoder, in evaluation mode."""

    def encode_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
        was_training = model.training
        model.eval()
        features = pooled_features(model(pixel_values.to(model.device)))
        model.train(was_training)
        return features

    return encode_pixels
