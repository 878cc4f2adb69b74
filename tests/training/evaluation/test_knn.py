"""k-NN against scikit-learn."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from hf_vicreg.training.evaluation.features import encode, encoded_batches
from hf_vicreg.training.evaluation.neighbours import knn_accuracy
from hf_vicreg.training.images.sources import ImageSource


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_equals_scikit_learn(neighbours):
    generator = torch.Generator().manual_seed(neighbours)
    centres = torch.randn(4, 8, generator=generator)
    labels = torch.randint(0, 4, (500,), generator=generator)
    features = centres[labels] + 1.2 * torch.randn(500, 8, generator=generator)
    bank, queries, bank_labels, query_labels = features[:300], features[300:], labels[:300], labels[300:]
    found = knn_accuracy(bank, bank_labels, queries, query_labels, neighbours=neighbours, temperature=0.07)
    reference = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.double(), bank_labels)
    expected = reference.score(queries.double(), query_labels)
    assert found == pytest.approx(expected, abs=1 / 200)
    assert 0.5 < found < 1


def test_small_bank_is_used_whole():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(bank, labels, bank, labels, neighbours=20) == 1.0


def png(index):
    buffer = BytesIO()
    Image.new("RGB", (2, 2), (index, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_encoding_skips_unreadable_images():
    def read(index):
        return b"broken" if index == 3 else png(index)

    def processor(images, return_tensors):
        return {"pixel_values": torch.tensor([image.getpixel((0, 0))[0] for image in images])[:, None]}

    source = ImageSource("few", 7, read, "few", labels=[10, 11, 12, 13, 14, 15, 16])
    features, labels = encode(source, processor, lambda pixels: pixels)
    assert features.flatten().tolist() == [0, 1, 2, 4, 5, 6]
    assert labels.tolist() == [10, 11, 12, 14, 15, 16]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_batch_is_the_same_for_any_number_of_processes(processes):
    def processor(images, return_tensors):
        return {"pixel_values": torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])[:, None]}

    def encode_pixels(pixels):  # rounding depends on the shape of a batch and on where an image is in it
        return pixels + torch.arange(len(pixels))[:, None] / len(pixels) / 100

    def read(index):
        return b"broken" if index in (1, 8, 9, 10, 11) else png(index)

    source = ImageSource("some", 18, read, "some")
    batches = [
        (indices, features.flatten().tolist())
        for rank in range(processes)
        for _, indices, features in encoded_batches(
            source, processor, encode_pixels, share=(rank, processes), batch_size=4
        )
    ]
    batches.sort()
    assert [indices for indices, _ in batches] == [[0, 2, 3], [4, 5, 6, 7], [12, 13, 14, 15], [16, 17]]
    for indices, features in batches:
        assert features == pytest.approx([index + place / 4 / 100 for place, index in enumerate(indices)])
