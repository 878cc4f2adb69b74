"""Recall and ranks of captions and images against a count by hand; zero-shot classes."""

import pytest
import torch

from hf_vicreg.training.image_text.retrieval import chance, numbered, prompts, retrieval_figures, zero_shot_predictions


def by_hand(queries, bank, is_own):
    ranks = []
    for number, query in enumerate(queries):
        cosines = [float(query @ one / query.norm() / one.norm()) for one in bank]
        own = max(cosine for place, cosine in enumerate(cosines) if is_own(number, place))
        ranks.append(1 + sum(c >= own for place, c in enumerate(cosines) if not is_own(number, place)))
    return torch.tensor(ranks)


def test_recalls_and_median_ranks_are_those_counted_by_hand():
    owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    images = torch.randn(13, 6)
    texts = images[owners] + 0.9 * torch.randn(16, 6)
    found = retrieval_figures(images, texts, owners)
    ways = {
        "image_to_text": by_hand(images, texts, lambda image, text: owners[text] == image),
        "text_to_image": by_hand(texts, images, lambda text, image: owners[text] == image),
    }
    for name, ranks in ways.items():
        assert found[f"{name}_median_rank"] == ranks.double().quantile(0.5).item()
        for count in (1, 5, 10):
            assert found[f"{name}_recall_{count}"] == pytest.approx((ranks <= count).double().mean().item())
    assert 0 < found["image_to_text_recall_1"] < 1


def test_a_caption_that_several_images_have_is_right_for_each():
    """Captions of classes, or of templates, repeat: a perfect encoder cannot tell them apart."""
    captions = ["a cat", "a dog", "a cat", "a red cat", "a dog"]
    owners, words = torch.tensor([0, 1, 2, 2, 3]), numbered(captions)
    assert words.tolist() == [0, 1, 0, 2, 1]
    images = torch.eye(4)[[0, 1, 0, 1]]
    texts = torch.eye(4)[[0, 1, 0, 2, 1]]
    found = retrieval_figures(images, texts, owners, words)
    assert (found["image_to_text_recall_1"], found["text_to_image_recall_1"]) == (1.0, 4 / 5)
    is_own = [[0, 2], [1, 4], [0, 2, 3], [1, 4]]
    ranks = by_hand(texts, images, lambda text, image: text in is_own[image])
    assert found["text_to_image_median_rank"] == ranks.double().quantile(0.5).item()
    assert chance(12, torch.arange(12), torch.zeros(12, dtype=torch.int64)) == {
        "image_to_text_recall_10": 1.0,
        "text_to_image_recall_10": 1.0,
    }


def test_a_collapsed_encoder_finds_nothing():
    found = retrieval_figures(torch.ones(12, 3), torch.ones(12, 3), torch.arange(12))
    assert found["image_to_text_recall_10"] == found["text_to_image_recall_10"] == 0


def test_chance_is_that_of_a_blind_search():
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(4000):
        hits += bool((torch.randperm(60, generator=generator)[:10] < 3).any())  # 3 captions an image, 20 images
    found = chance(20, torch.arange(60) // 3)
    assert found["image_to_text_recall_10"] == pytest.approx(hits / 4000, abs=0.03)  # four standard errors
    assert found["text_to_image_recall_10"] == 0.5
    assert chance(5, torch.arange(5)) == {"image_to_text_recall_10": 1.0, "text_to_image_recall_10": 1.0}


def test_an_image_has_the_class_whose_mean_text_is_nearest():
    assert prompts(["a {}", "{}!"], ["cat", "dog"]) == ["a cat", "cat!", "a dog", "dog!"]
    texts = torch.tensor([[1.0, 0.2], [50.0, -10.0], [0.0, 1.0], [0.1, 3.0]])  # lengths do not count
    images = torch.tensor([[2.0, 0.1], [0.1, 5.0]])
    assert zero_shot_predictions(images, texts, 2).tolist() == [0, 1]
