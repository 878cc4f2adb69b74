"""k-NN accuracy: how often an image's nearest neighbours in feature space share its class."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import pooled_features
from hf_vicreg.training.evaluation.exact_cosine import exact_cosines
from hf_vicreg.training.sources import ImageSource

TEMPERATURE = 0.07
BATCH_SIZE = 64
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
        share: As for `encoded_batches`.

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
    """Yield batch after batch of a source: how many images came before, indices of its readable images, features.

    Which kernels a processor takes, and with them the last bits of the features, depends on the shape of a batch. So
    batches are cut the same way for any number of processes, and one with too few images is filled up with copies:
    the features are the same however many processes share the work.

    Args:
        source: Images.
        processor: Turns a list of images into `pixel_values`.
        encode_pixels: `(batch, channels, height, width)` to `(batch, features)`.
        share: (rank, processes): every how-manieth batch, and from which on, this call encodes.
        batch_size: Images of every batch.

    Yields:
        Images of the share before this batch, indices in the source, `(readable images, features)` float32 on the CPU.
    """
    rank, processes = share
    for turn, start in enumerate(range(rank * batch_size, len(source), processes * batch_size)):
        read = [(index, source.read(index)) for index in range(start, min(start + batch_size, len(source)))]
        readable = [index for index, image in read if image is not None]
        if readable:
            images: list[Image.Image] = [image for _, image in read if image is not None]
            pixel_values = processor(images, return_tensors="pt")["pixel_values"]
            filled = pixel_values[torch.arange(batch_size) % len(images)]
            yield turn * batch_size, readable, encode_pixels(filled)[: len(images)].float().cpu()


def model_encoder(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values to the pooled features of any vision encoder, in evaluation mode."""

    def encode_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
        was_training = model.training
        model.eval()
        features = pooled_features(model(pixel_values.to(model.device)))
        model.train(was_training)
        return features

    return encode_pixels
