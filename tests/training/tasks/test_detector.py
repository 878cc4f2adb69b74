"""The detector: the encoder's weights arrive, all of it learns, and transformers loads what is saved."""

import math

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, ViTConfig

from hf_vicreg import BigBirdViTBackbone, BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel, VicRegConfig
from hf_vicreg.training.engine.checkpoint import RunState, checkpoint_writer, copied, load_tensors
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.arguments import DetectionArguments
from hf_vicreg.training.tasks.detection.coco_map import mean_average_precision
from hf_vicreg.training.tasks.detection.data import Objects
from hf_vicreg.training.tasks.detection.model import (
    build_detector,
    build_detector_processor,
    canvas_size,
    centre_features,
    find_boxes,
    learning_rate_scale,
)
from hf_vicreg.training.tasks.training import scaled_groups

NAMES = ["ball", "box"]


def tiny_config(**changes):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BigBirdViTConfig(**settings | {"image_size": 32, "patch_size": 8, "tile_size": 1} | changes)


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "encoder"
    torch.manual_seed(5)  # not the seed that new weights are drawn with
    BigBirdViTModel(tiny_config()).save_pretrained(folder)
    BigBirdViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags():
    return DetectionArguments(num_queries=7, d_model=32, encoder_layers=1, decoder_layers=2)


def batch():
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]])},
        {"class_labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)},
    ]
    return {"pixel_values": torch.randn(2, 3, 40, 64), "labels": labels}


def test_weights_arrive_and_everything_learns(encoder, flags):
    detector = build_detector(encoder, NAMES, flags)
    expected = BigBirdViTBackbone.from_pretrained(encoder).state_dict()
    found = detector.model.backbone.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    outputs = detector(**batch())
    assert outputs.logits.shape == (2, 7, 2)
    assert outputs.logits.sigmoid().max() < 0.1  # no class likely at the start
    outputs.loss.backward()
    without = [name for name, one in detector.named_parameters() if one.grad is None]
    assert not without
    assert "/" not in detector.config.backbone_config.name_or_path
    other = build_detector(encoder, NAMES, DetectionArguments(**vars(flags) | {"from_scratch": True, "seed": 1}))
    query = "encoder.layer.0.attention"
    key = next(key for key in expected if key.startswith(query) and key.endswith("weight"))
    assert not torch.equal(other.model.backbone.model.state_dict()[key], expected[key])


def test_queries_look_everywhere_at_the_start(encoder):
    model = build_detector(encoder, NAMES, DetectionArguments(d_model=64)).model
    points = model.reference_points(model.query_position_embeddings.weight[:, :64]).sigmoid()
    assert points.min() < 0.15
    assert points.max() > 0.85
    assert points.std() > 0.2


def test_what_all_patches_have_in_common_is_taken_out(encoder, flags):
    detector = build_detector(encoder, NAMES, flags)
    inputs = {"pixel_values": torch.randn(3, 3, 40, 64), "pixel_mask": torch.ones(3, 40, 64, dtype=torch.int64)}
    inputs["pixel_mask"][1, :, 32:] = 0  # padding does not count
    centre_features(detector, inputs)
    features = detector.model.backbone.model(inputs["pixel_values"]).feature_maps[0]
    projected = detector.model.input_proj[0][0](features)
    patches = torch.cat([projected[0].flatten(1), projected[1, :, :, :4].flatten(1), projected[2].flatten(1)], dim=1)
    assert patches.mean(1).abs().max() < 1e-5
    assert detector.training


def test_an_image_batch_without_objects_has_a_loss(encoder, flags):
    inputs = batch()
    inputs["labels"] = [inputs["labels"][1]] * 2
    assert build_detector(encoder, NAMES, flags)(**inputs).loss.isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_a_loss_of_nan_for_the_guard(value, encoder, flags):
    detector, inputs = build_detector(encoder, NAMES, flags), batch()
    inputs["pixel_values"][0, 0, 0, 0] = value
    loss = detector(**inputs).loss
    assert loss.isnan()
    loss.backward()  # all of it, or other processes would wait
    assert not [name for name, one in detector.named_parameters() if one.grad is None]


def test_transformers_loads_what_is_saved(encoder, flags, tmp_path):
    detector = build_detector(encoder, NAMES, flags).eval()
    processor = build_detector_processor(encoder, detector.config.backbone_config, 48, 70)
    detector.save_pretrained(tmp_path / "detector")
    processor.save_pretrained(tmp_path / "detector")
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "detector").eval()
    assert again.config.id2label == {0: "ball", 1: "box"}
    same = AutoImageProcessor.from_pretrained(tmp_path / "detector")
    images = [Image.new("RGB", (100, 50), (250, 20, 20)), Image.new("RGB", (30, 60))]
    found, expected = (find_boxes(*both, images, threshold=0.0) for both in ((again, same), (detector, processor)))
    assert len(expected[0]["boxes"]) == 14
    assert all(torch.equal(one[key], other[key]) for one, other in zip(found, expected, strict=True) for key in one)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
    inputs = same(images, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 48, 72)  # 70 pixels are no whole number of patches
    assert inputs["pixel_mask"][0].sum() == 36 * 72  # not squashed
    assert inputs["pixel_mask"][1].sum() == 48 * 24
    # one canvas for all: what is found does not depend on the others in the batch
    alone = find_boxes(again, same, images[:1], threshold=0.0)[0]
    assert torch.allclose(alone["boxes"], found[0]["boxes"], atol=1e-3)


def test_a_checkpoint_keeps_weights_with_several_names(encoder, flags, tmp_path):
    detector = build_detector(encoder, NAMES, flags)
    optimizer = torch.optim.AdamW(detector.parameters())
    detector(**batch()).loss.backward()
    optimizer.step()
    path = checkpoint_writer(tmp_path / "checkpoints", RunState(step=1), copied(detector, optimizer), {}, 1)()
    other = build_detector(encoder, NAMES, DetectionArguments(**vars(flags) | {"seed": 1}))
    load_tensors(path, other, torch.optim.AdamW(other.parameters()), 0)
    expected = detector.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in other.state_dict().items())
    assert other.class_embed[0].weight is other.class_embed[1].weight


def test_learning_rates(encoder, flags):
    detector = build_detector(encoder, NAMES, flags)
    groups = scaled_groups(detector, 0.1, lambda name: learning_rate_scale(name, 0.5))
    by_scale = {scale: sum(len(one["params"]) for one in groups if one["scale"] == scale) for scale in (0.1, 0.5, 1.0)}
    assert by_scale[0.5] == len(list(detector.model.backbone.parameters()))
    slow = [
        name for name, _ in detector.named_parameters() if "sampling_offsets" in name or "reference_points" in name
    ]
    assert by_scale[0.1] == len(slow) == 2 * (1 + 2 + 1)
    assert sum(by_scale.values()) == len(list(detector.parameters()))
    groups = scaled_groups(detector, 0.1, lambda name: learning_rate_scale(name, 0.0))
    assert sum(len(one["params"]) for one in groups) == sum(by_scale.values()) - by_scale[0.5]
    assert not any(one.requires_grad for one in detector.model.backbone.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: ViTConfig().save_pretrained(folder), "expected a model of type 'bigbird_vit', got 'vit'"),
        (lambda folder: VicRegConfig(encoder=tiny_config()).save_pretrained(folder), "is the wrapper around one"),
        (lambda folder: tiny_config().save_pretrained(folder), "a model in safetensors form"),
    ],
    ids=["vit", "wrapper", "no-weights"],
)
def test_other_models_are_refused(make, message, flags, tmp_path):
    make(tmp_path)
    with pytest.raises(InputError, match="`MODEL`") as caught:
        build_detector(str(tmp_path), NAMES, flags)
    assert message in str(caught.value)


def test_canvas_holds_whole_patches():
    assert canvas_size(tiny_config(), 48, 64) == (48, 64)
    assert canvas_size(tiny_config(), 49, 3) == (56, 8)
    assert canvas_size(tiny_config(patch_stride=4), 49, 64) == (52, 64)


def test_map_is_cocos():
    truths = [
        Objects(torch.tensor([[10.0, 10.0, 20.0, 20.0], [50.0, 50.0, 10.0, 10.0]]), torch.tensor([0, 1])),
        Objects(torch.tensor([[0.0, 0.0, 30.0, 30.0]]), torch.tensor([0])),
    ]

    def found(boxes, scores, labels):
        return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    nothing = {"boxes": torch.empty(0, 4), "scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.int64)}
    perfect = [
        found([[10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 60.0, 60.0]], [0.9, 0.8], [0, 1]),
        found([[0.0, 0.0, 30.0, 30.0]], [0.7], [0]),
    ]
    metrics, by_class = mean_average_precision(perfect, truths, [*NAMES, "cone"])
    assert metrics == pytest.approx({"map": 1, "map_50": 1, "map_75": 1})
    assert set(by_class) == {"ball", "box"}  # no cone among the truths
    # one of two balls found, its overlap 20 * 20 / (20 * 25) = 0.8, and a ball that is none with a lower score
    some = [found([[10.0, 10.0, 30.0, 35.0], [70.0, 0.0, 80.0, 10.0]], [0.9, 0.1], [0, 0]), nothing]
    metrics, by_class = mean_average_precision(some, truths, NAMES)
    half = 51 / 101  # COCO reads precision at 101 recalls, here 1 up to and with recall 0.5
    assert by_class["ball"] == pytest.approx({"ap": half * 7 / 10, "ap_50": half})  # overlaps of 0.5, 0.55 ... 0.8
    assert metrics["map_50"] == pytest.approx(half / 2)
    assert mean_average_precision([nothing, nothing], truths, NAMES) == (
        {"map": 0.0, "map_50": 0.0, "map_75": 0.0},
        {},
    )
