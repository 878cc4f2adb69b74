"""What lies near in an encoder's feature space: neighbours, a map, and which classes are taken for which."""

import logging
from dataclasses import dataclass

import torch
from PIL import Image

from hf_vicreg.hub_space.pictures import fitted
from hf_vicreg.report.run_images import MAX_BANK, ReportImages, spread, subset
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import VisionEncoder
from hf_vicreg.training.evaluation.features import pixels_of
from hf_vicreg.training.evaluation.neighbours import knn_predictions, nearest_in_bank
from hf_vicreg.training.evaluation.pictures import confusion_matrix
from hf_vicreg.training.images.image_source import ImageSource

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
SIDE = 96  # in pixels, of an image that is kept to be shown
NUM_QUERIES, NUM_NEIGHBOURS = 8, 6
PERPLEXITY, LEAST_FOR_TSNE = 30, 100


@dataclass(frozen=True)
class Encoded:
    """The readable images of a source, encoded.

    Attributes:
        places: Of each image in its source.
        values: `(images, features)` float32.
        images: Small copies.
        labels: `(images,)` int64, or None.
    """

    places: list[int]
    values: torch.Tensor
    images: list[Image.Image]
    labels: torch.Tensor | None


@dataclass(frozen=True)
class Space:
    """Held-out images among the training images, or among themselves.

    Attributes:
        bank: Where neighbours are looked for.
        held_out: What is looked at.
        queries: Places in `held_out` of those whose neighbours are shown.
        nearest: For each of them (place in `bank`, cosine), nearest first.
        maps: Coordinates `(images, 2)` in [0, 1] of the held-out images, by the method's name.
        confusion: Counts `(classes, classes)`, rows true, columns predicted; None without labels.
        neighbours: k of the k-NN that predicted.
    """

    bank: Encoded
    held_out: Encoded
    queries: list[int]
    nearest: list[list[tuple[int, float]]]
    maps: dict[str, torch.Tensor]
    confusion: torch.Tensor | None
    neighbours: int


def encode_images(source: ImageSource, encoder: VisionEncoder) -> Encoded:
    """Return the readable images of a source with their features.

    Raises:
        InputError: None can be read, or features are not finite.
    """
    places, values, images = [], [], []
    for start in range(0, len(source), BATCH_SIZE):
        read = [(place, source.read(place)) for place in range(start, min(start + BATCH_SIZE, len(source)))]
        batch = [image for _, image in read if image is not None]
        if batch:
            pixels = pixels_of(batch, encoder.processor, BATCH_SIZE)
            values.append(encoder(pixels)[: len(batch)].float().cpu())
            images += [fitted(image, SIDE) for image in batch]
            places += [place for place, image in read if image is not None]
    if not places:
        raise InputError(f"`data`: expected readable images in {source.name}, found none; check them.")
    features = torch.cat(values)
    if not features.isfinite().all():
        raise InputError("`RUN`: expected finite features, found NaN or infinity; its weights are damaged.")
    labels = None if source.labels is None else torch.tensor([source.labels[place] for place in places])
    return Encoded(places, features, images, labels)


def look_around(encoder: VisionEncoder, images: ReportImages, neighbours: int) -> Space:
    """Return what lies near what.

    Args:
        encoder: The run's.
        images: Held-out ones, and a bank if they are apart.
        neighbours: k of the k-NN.

    Raises:
        InputError: As `encode_images`.
    """
    held_out = encode_images(images.held_out, encoder)
    bank = held_out
    if images.is_apart:
        bank = encode_images(subset(images.train, spread(len(images.train), MAX_BANK)), encoder)
    queries = _queries(held_out)
    count = min(NUM_NEIGHBOURS + (bank is held_out), len(bank.values))
    nearest: list[list[tuple[int, float]]] = []
    for cosines, found in nearest_in_bank(bank.values, held_out.values[queries], count):
        for query, row_cosines, row in zip(queries[len(nearest) :], cosines.tolist(), found.tolist(), strict=False):
            pairs = zip(row, row_cosines, strict=True)
            itself = query if bank is held_out else -1
            nearest.append([pair for pair in pairs if pair[0] != itself][:NUM_NEIGHBOURS])
    confusion = None
    neighbours = max(1, min(neighbours, len(bank.values)))
    if bank is not held_out and bank.labels is not None and held_out.labels is not None:
        (predicted,) = knn_predictions(bank.values, bank.labels, held_out.values, neighbours=[neighbours]).values()
        classes = len(images.label_names or [])
        confusion = confusion_matrix(held_out.labels, predicted, classes)
    return Space(bank, held_out, queries, nearest, maps_of(held_out.values), confusion, neighbours)


def maps_of(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return maps of features `(images, features)`, compared by cosine: `PCA` and, where scikit-learn is, `t-SNE`."""
    directions = torch.nn.functional.normalize(features.double(), dim=1)
    centred = directions - directions.mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    components = left * scale
    flat = components[:, :2]
    maps = {"PCA": _in_unit_square(torch.nn.functional.pad(flat, (0, 2 - flat.shape[1])))}
    # scikit-learn divides by the first component's deviation; of features that are all one its code would crash
    if len(features) >= LEAST_FOR_TSNE and components[:, 0].std() > 1e-7:
        try:
            from sklearn.manifold import TSNE
            from threadpoolctl import threadpool_limits  # which scikit-learn needs itself
        except ImportError:
            logger.info("no t-SNE beside the PCA: scikit-learn is not installed; pip install scikit-learn")
            return maps
        start = components[:, :50].numpy()
        with threadpool_limits(1):  # threads that wait for each other at every step: ten times slower on busy cores
            found = TSNE(perplexity=PERPLEXITY, init="pca", random_state=0, max_iter=500).fit_transform(start)
        maps["t-SNE"] = _in_unit_square(torch.from_numpy(found).double())
    return maps


def _in_unit_square(points: torch.Tensor) -> torch.Tensor:
    low, high = points.amin(0), points.amax(0)
    return (points - low) / (high - low).clamp(min=1e-12)


def _queries(held_out: Encoded) -> list[int]:
    """Return places of images to look at: one of each class as long as there are, else spread evenly."""
    if held_out.labels is None:
        return spread(len(held_out.places), NUM_QUERIES)
    firsts: dict[int, int] = {}
    for place, label in enumerate(held_out.labels.tolist()):
        firsts.setdefault(label, place)
    chosen = [firsts[label] for label in sorted(firsts)]
    return [chosen[place] for place in spread(len(chosen), NUM_QUERIES)]
