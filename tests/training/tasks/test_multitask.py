"""The parts of a fine-tuning for several tasks: balance, shares of a step, labels, units, the file, one encoder."""

import datasets
import pytest
import torch
from PIL import Image

from hf_vicreg import BigBirdViTConfig, BigBirdViTForImageClassification, BigBirdViTModel
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTBackbone
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.arguments import LabelArguments, MultitaskArguments
from hf_vicreg.training.tasks.multitask.label_heads import Units, measured
from hf_vicreg.training.tasks.multitask.labels import load_classes, load_numbers, load_several_classes
from hf_vicreg.training.tasks.multitask.model import MultitaskModel, balanced_loss, share_parameters
from hf_vicreg.training.tasks.multitask.step import batch_shares
from hf_vicreg.training.tasks.multitask.tasks_file import read_tasks


def test_gradients_of_the_learned_weights_are_those_of_the_formula():
    losses = torch.tensor([0.3, 4.0, 1.7], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.2, -1.1, 0.7], dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    total = balanced_loss(losses, s, factors)
    total.backward()
    sigma = (s.detach() / 2).exp()  # of the source: c / sigma^2 * L + log sigma, c one half for a squared error
    written = (factors / sigma**2 * losses.detach() + sigma.log()).sum()
    torch.testing.assert_close(total.detach(), written, rtol=0, atol=1e-10)
    torch.testing.assert_close(losses.grad, factors / sigma**2, rtol=0, atol=1e-10)
    # d/ds = d/dsigma * sigma / 2
    of_sigma = -2 * factors * losses.detach() / sigma**3 + 1 / sigma
    torch.testing.assert_close(s.grad, of_sigma * sigma / 2, rtol=0, atol=1e-10)


class Squares(torch.nn.Module):
    """A head whose loss is a number times the square of its only weight."""

    def __init__(self, encoder):
        super().__init__()
        self.inner, self.weight = encoder, torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, number):
        return type("Output", (), {"loss": number * self.weight**2})


def tiny_encoder(kind=BigBirdViTModel, **fields):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    return kind(BigBirdViTConfig(image_size=16, patch_size=8, tile_size=1, **shape | fields))


@pytest.mark.parametrize("weights", [None, {"one": 2.0, "two": 0.25}], ids=["learned", "fixed"])
def test_the_whole_loss_is_of_the_heads_in_their_order(weights):
    heads = {"two": Squares(tiny_encoder(BigBirdViTBackbone)), "one": Squares(tiny_encoder())}
    model = MultitaskModel(tiny_encoder(), heads, {"one": 1.0, "two": 0.5}, {"one": 0.5, "two": 1.0}, weights)
    if weights is None:
        model.log_variances.data = torch.tensor([0.4, -0.6], dtype=torch.float64)  # of two, of one
    total, losses = model({"one": {"number": 3.0}, "two": {"number": 10.0}})
    assert (losses["one"].item(), losses["two"].item()) == (12.0, 20.0)
    present = {name: one.item() for name, one in model.present_weights().items()}
    if weights is None:
        two, one = torch.tensor([-0.4, 0.6], dtype=torch.float64).exp()
        assert present == pytest.approx({"two": two.item(), "one": one.item() / 2})
        assert total.item() == pytest.approx((20 * two + 12 * one / 2 + (0.4 - 0.6) / 2).item())
    else:
        assert present == weights
        assert total.item() == pytest.approx(2 * 12 + 0.25 * 20)


def test_all_heads_learn_the_same_encoder():
    encoder = tiny_encoder(pooler_act="tanh")  # which a classifier and a backbone have no use for
    classifier = BigBirdViTForImageClassification(encoder.config)
    backbone = tiny_encoder(BigBirdViTBackbone)
    for head in (classifier, backbone):
        share_parameters(encoder, head)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone(pixels).feature_maps[0], backbone(pixels).feature_maps[0])
    classifier(pixels).logits.sum().backward()
    backbone(pixels).feature_maps[0].sum().backward()
    own = {id(one) for one in encoder.parameters()}
    for head in (classifier.bigbird_vit, backbone):
        assert {id(one) for one in head.parameters()} <= own
    projection = encoder.embeddings.projection.weight
    assert projection.grad.abs().sum() > 0
    with torch.no_grad():
        projection.zero_()
    assert not classifier.bigbird_vit.embeddings.projection.weight.any()


@pytest.mark.parametrize(
    ("sizes", "batch_size", "temperature", "processes", "expected"),
    [
        ({"a": 300, "b": 100}, 32, 1, 1, {"a": 24, "b": 8}),
        ({"a": 300, "b": 100}, 32, 1, 4, {"a": 24, "b": 8}),
        ({"a": 400, "b": 100}, 30, 2, 1, {"a": 20, "b": 10}),
        ({"a": 10_000, "b": 100}, 32, 1e6, 1, {"a": 16, "b": 16}),
        ({"a": 10_000, "b": 1}, 32, 1, 1, {"a": 31, "b": 1}),
        ({"a": 10_000, "b": 3}, 32, 1e6, 1, {"a": 16, "b": 3}),  # no more than there are
        ({"a": 5, "b": 5, "c": 5}, 3, 1, 1, {"a": 1, "b": 1, "c": 1}),
        ({"a": 900, "b": 1, "c": 1}, 4, 1, 1, {"a": 2, "b": 1, "c": 1}),
        ({"a": 50, "b": 50, "c": 50}, 32, 1, 1, {"a": 11, "b": 11, "c": 10}),
    ],
)
def test_shares_of_a_step(sizes, batch_size, temperature, processes, expected):
    assert batch_shares(sizes, batch_size, temperature, processes) == expected


def test_shares_that_cannot_be():
    with pytest.raises(InputError, match=r"`batch_size`: expected at least 4, an image of each of 2 tasks"):
        batch_shares({"a": 10, "b": 10}, 3, 1, 2)
    with pytest.raises(InputError, match=r"`b\.train_split`: expected an image for each of 2 processes, got 1"):
        batch_shares({"a": 10, "b": 1}, 32, 1, 2)


def test_a_regression_is_in_the_units_of_its_column():
    torch.manual_seed(0)
    head, features = torch.nn.Linear(5, 2), torch.randn(7, 5)
    units = Units(torch.tensor([100.0, -3.0]), torch.tensor([20.0, 0.5]))
    natural = units.natural(head(features))
    torch.testing.assert_close(units.standard(natural), head(features))
    units.move_into(head)
    torch.testing.assert_close(head(features), natural)
    assert torch.equal(units.natural(natural), natural)  # not twice


def test_figures_of_the_three_kinds():
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1.0, -2.0, -3.0], [1.0, 3.0, -1.0]])
    assert measured("classification", logits, torch.tensor([[0], [0], [2]])) == {"accuracy": pytest.approx(2 / 3)}
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # found 4, there are 4, 3 of both
    assert measured("multi_label_classification", logits, truth) == pytest.approx({"f1": 6 / 8, "exact_match": 1 / 3})
    found, truth = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    assert measured("regression", found, truth) == pytest.approx({"mae": 2 / 3, "r2": 1 - 2 / 8})
    assert "r2" not in measured("regression", found, torch.ones(3, 1))


@pytest.fixture
def saved(tmp_path):
    """Returns a function from a column of labels, and its feature, to the flags of a data set that has it."""

    def make(labels, feature=None, test=None):
        splits = {}
        for split, values in (("train", labels), ("test", labels if test is None else test)):
            images = [Image.new("RGB", (20, 20), (20 * number, 0, 0)) for number in range(len(values))]
            rows = datasets.Dataset.from_dict({"image": images, "label": values})
            rows = rows.cast_column("image", datasets.Image())
            splits[split] = rows if feature is None else rows.cast_column("label", feature)
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
        return LabelArguments(dataset_name=str(tmp_path / "data"))

    return make


def test_labels_become_targets(saved):
    train, test, names = load_classes(saved(["cat", "dog", "cat"], test=["dog"]))
    assert names == ["cat", "dog"]
    assert [one.tolist() for one in train.annotations] == [[0], [1], [0]]
    assert [one.tolist() for one in test.annotations] == [[1]]
    train, _, names = load_several_classes(saved([["sky", "cat"], [], ["sky"]]))
    assert names == ["cat", "sky"]
    assert [one.tolist() for one in train.annotations] == [[1, 1], [0, 0], [0, 1]]
    named = datasets.List(datasets.ClassLabel(names=["sky", "cat"]))
    train, _, names = load_several_classes(saved([[1, 0], [], [0]], named))
    assert names == ["sky", "cat"]
    assert [one.tolist() for one in train.annotations] == [[1, 1], [0, 0], [1, 0]]
    train, _, names = load_numbers(saved([1.5, 2.0, -1.0]))
    assert ([one.tolist() for one in train.annotations], names) == ([[1.5], [2.0], [-1.0]], ["label"])
    train, _, names = load_numbers(saved([[1, 2], [3, 5]]))
    assert ([one.tolist() for one in train.annotations], names) == ([[1, 2], [3, 5]], ["label_0", "label_1"])


def test_other_labels_are_other_data(saved):
    one, other = (load_classes(saved(labels))[0] for labels in (["a", "b", "a"], ["a", "b", "b"]))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("load", "labels", "feature", "message"),
    [
        (load_classes, [0, 1, 0], datasets.ClassLabel(names=["cat", "dog", "bird"]), "found none of 'bird'; take"),
        (load_several_classes, ["cat", "dog"], None, "expected a list of classes, got 'cat' in row 0 of 'train'"),
        (
            load_several_classes,
            [[], []],
            datasets.List(datasets.Value("string")),
            "expected class indices .* got none",
        ),
        (load_several_classes, [[0], [2]], None, "training images of each of 3 classes, found none of '1'"),
        (
            load_several_classes,
            [[0], [-1]],
            None,
            "expected class indices from 0 on or class names in the lists, got -1",
        ),
        (load_numbers, ["much", "little"], None, "expected a number, got 'much' in row 0 of 'train'"),
        (load_numbers, [1.0, None], None, "expected a number, got 'None' in row 1 of 'train'"),
        (load_numbers, [1.0, float("nan")], None, "expected a number, finite in 32 bits, got 'nan' in row 1"),
        (load_numbers, [1.0, 1e300], None, "expected a number, finite in 32 bits, got '1e\\+300' in row 1"),
        (load_numbers, [[1.0, 2.0], [1.0]], None, "expected a list of 2 numbers, got '\\[1.0\\]' in row 1"),
        (load_numbers, [[1.0, 2.0], [1.0, 3.0]], None, "output 0 is 1 for all 2 training images"),
        (load_numbers, [0.1] * 7, None, "output 0 is 0.1 for all 7 training images"),
    ],
)
def test_labels_that_are_none(saved, load, labels, feature, message):
    with pytest.raises(InputError, match=f"`label_column_name`: .*{message}"):
        load(saved(labels, feature))


def test_a_class_that_training_images_do_not_have(saved):
    with pytest.raises(InputError, match="expected classes among the 2 of the training images, got 'bird' in row 0"):
        load_several_classes(saved([["cat"], ["dog"]], test=[["bird"]]))


ONE = "tasks:\n- {name: one, kind: classification, dataset_name: data}\n"


@pytest.mark.parametrize(
    ("text", "message", "flags"),
    [
        ("model: m\n" + ONE + "- {name: one, kind: detection, dataset_name: d}", "`tasks`: .* two tasks 'one'", {}),
        ("model: m\n" + ONE + "- {name: two, kind: parsing}", "`two.kind`: expected one of .*, got 'parsing'", {}),
        ("model: m\n" + ONE + "- {name: two, kind: [x]}", "`two.kind`: expected one of classification,", {}),
        ("model: m\n" + ONE + "- {name: Two, kind: detection}", r"`tasks\[1\].name`: expected small letters", {}),
        ("model: m\n" + ONE + "- two", r"`tasks\[1\]`: expected a mapping with `name` and `kind`", {}),
        ("model: m\n" + ONE + "- {name: two, kind: detection}", "`two.dataset_name`: expected annotated images", {}),
        ("modle: m\n" + ONE, "`modle`: unknown key in .*; did you mean `model`?", {}),
        (ONE, "`model`: expected the folder or Hub id of an encoder", {}),
        ("model: m\n", "`tasks`: expected a list of tasks", {}),
        ("model: m\nmodel: n\n" + ONE, "`TASKS`: .* is not YAML: key 'model' is there twice", {}),
        ("- model", "`TASKS`: expected a mapping", {}),
        ("model: [", "`TASKS`: .* is not YAML", {}),
        ("model: m\n" + ONE.replace("kind", "text_column_name: t, kind"), "`one.text_column_name`: unknown", {}),
        ("model: m\n" + ONE.replace("kind", "label_colum_name: t, kind"), "did you mean `label_column_name`", {}),
        ("model: m\n" + ONE.replace("kind", "batch_size: 4, kind"), "`one.batch_size`: expected once for", {}),
        ("model: m\n" + ONE.replace("kind", "lora_rank: 4, kind"), "`one.lora_rank`: unknown key", {}),
        ("model: m\n" + ONE.replace("kind", "max_train_samples: few, kind"), "`one.max_train_samples`: exp", {}),
        ("model: m\n" + ONE.replace("kind", "crop_min_ratio: 2, kind"), "`one.crop_min_ratio`: expected a num", {}),
        ("model: m\n" + ONE.replace("kind", "weight: 2, kind"), "`one.weight`: exp", {"weighting": "uncertainty"}),
        ("model: m\n" + ONE.replace("kind", "weight: 0, kind"), "`one.weight`: expected a number above 0", {}),
        ("model: m\n" + ONE, "`only`: expected one of the tasks one, got 'two'", {"only": "two"}),
    ],
)  # fmt: skip
def test_a_file_that_is_none(tmp_path, text, message, flags):
    (tmp_path / "tasks.yaml").write_text(text)
    arguments = MultitaskArguments(output_dir=str(tmp_path / "out"), **flags)
    with pytest.raises(InputError, match=message):
        read_tasks(str(tmp_path / "tasks.yaml"), arguments)


def test_what_a_file_says_and_what_the_flags_say(tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        "model: m\ntasks:\n- &one {name: one, kind: regression, dataset_name: data, weight: 2}\n"
        "- {<<: *one, name: two, kind: captioning, max_target_length: 8}\n"
    )
    arguments = MultitaskArguments(output_dir=str(tmp_path / "out"), weighting="fixed", seed=5, learning_rate=1e-3)
    model, (one, two) = read_tasks(str(tmp_path / "tasks.yaml"), arguments)
    assert (model, one.kind, two.kind, one.weight, two.weight) == ("m", "regression", "captioning", 2.0, 2.0)
    assert (two.arguments.max_target_length, two.arguments.seed, two.arguments.learning_rate) == (8, 5, 1e-3)
    assert two.arguments.dataset_name == "data"
    assert "seed" not in two.settings
