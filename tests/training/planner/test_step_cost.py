"""FLOPs of a step against those that torch counts in the real one, and what the log makes of them."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, PreTrainedModel

from hf_vicreg import pretrain
from hf_vicreg.model_cards.results import compute, in_flops
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.engine.step import speed
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.monitor import run_log
from hf_vicreg.training.monitor.run_log import LOG_FILE, LateCost, StepCost, Stopwatch, read_log
from hf_vicreg.training.planner.step_cost import count_step, device_peak, shapes_of, step_cost
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.texts.captions import Captions

DENSE = {"attention_type": "original_full"}
LOCAL = {"num_local_views": 2, "local_image_size": 16}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
KINDS = {
    "byol, local views": {"objective": "byol", "views": LOCAL},
    "mae and vicreg": {
        "objective": "mae+vicreg",
        "mae": {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2},
    },
    "convolutions, moments": {"model": RESNET, "views": {"image_size": 32}, "vicreg": {"expander_sizes": [16, 4]}},
}


@pytest.fixture
def built(tiny_recipe, tmp_path, image_folder):
    """Returns a function from changes of a recipe with dense attention to the run's configuration and model."""
    images = image_folder(16)

    def make(**changes):
        own = {"train_dir": str(images), "output_dir": str(tmp_path / "run"), "batch_size": 8, "max_steps": 2}
        tiny_recipe["model"] |= DENSE
        if "model_type" in changes.get("model", {}):
            tiny_recipe["model"] = {}
        for name, change in changes.items():
            tiny_recipe[name] = tiny_recipe.get(name, {}) | change if isinstance(change, dict) else change
        config = resolve(tiny_recipe | own | {key: changes[key] for key in own if key in changes})
        return config, VicRegForPreTraining(config.vicreg)

    return make


def counted_in_a_step(config, model):
    """What torch counts in the first step of a run, whose attention is eager."""
    source, _, _ = load_images(config)
    loop = pretraining_loop(
        config, source, model, build_accelerator("no", device="cpu"), None, StopRequest(Path("nowhere"), None)
    )
    for one in model.modules():
        if isinstance(one, PreTrainedModel) and one is not model:
            one.set_attn_implementation("eager")
    loop.step.train_mode()
    batches = [batch for batch, _ in zip(loop.step.batches(0), range(loop.step.pieces), strict=False)]
    with FlopCounterMode(display=False) as counter:
        loop.step.backward(batches, 0)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_those_of_the_real_step(built, kind):
    config, model = built(**KINDS[kind])
    before = torch.get_rng_state()
    found = count_step(shapes_of(model), config)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == (counted_in_a_step(config, model),) * 2


def test_what_is_computed_twice_counts_once(built):
    plain = built()
    config, model = built(batch_size=4, statistics_batch_size=8, gradient_checkpointing=True)
    found, _ = count_step(shapes_of(model), config)
    assert found == count_step(shapes_of(plain[1]), plain[0])[0] == counted_in_a_step(*plain)
    assert counted_in_a_step(config, model) > found


def test_sparse_attention_counts_the_pairs_of_its_pattern(built):
    config, model = built()
    dense, _ = count_step(shapes_of(model), config)
    sparse = {"attention_type": "block_sparse", "tile_size": 1, "num_random_blocks": 1}
    config, model = built(model=sparse)
    patterns = model.encoder.attention_patterns(32, 32)
    missing = sum(int(pattern.token_mask().logical_not().sum()) for pattern in patterns)
    assert missing > 0
    assert (
        dense - count_step(shapes_of(model), config)[0] == 3 * 4 * 8 * 2 * missing * config.vicreg.encoder.hidden_size
    )


def test_what_is_held_still_counts_its_way_there_alone(built):
    config, model = built()
    config.run.freeze_layers, config.run.expander_warmup_ratio = 1, 0.5
    frozen, held = count_step(shapes_of(model), config)
    with FlopCounterMode(display=False) as counter:
        model.eval().encoder.set_attn_implementation("eager")
        model.encode(pixel_values=torch.zeros(8, 2, 3, 32, 32))
    # of two views: the expander's layers without a gradient at its input, and the Gram matrix with its product
    expander = 2 * 2 * 8 * (3 * (32 * 64 + 64 * 64) - 32 * 64)
    assert held == counter.get_total_flops() + expander + 2 * 2 * (2 * 8 * 8 * 64)
    patches = 2 * 8 * 17
    layer = 2 * patches * (4 * 32 * 32 + 2 * 32 * 48) + 4 * patches * 17 * 32
    assert frozen - held == 2 * layer + 2 * 2 * 8 * 32 * 64  # the second layer on the way back, and that input
    cost = StepCost(frozen, held, 0.5)
    assert [cost.at(step, 5) for step in range(5)] == [held, held, frozen, frozen, frozen]


def test_a_text_branch_counts_the_mean_length_of_its_captions(built):
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config, _ = built()
    config.vicreg.second_encoder = BertConfig(**{k: v for k, v in text.items() if k != "model_type"}, vocab_size=9)
    model = VicRegForPreTraining(config.vicreg)
    captions = Captions([[""], [""]], [[[1] * 3], [[1] * 6]], None)
    model.eval()
    for encoder in model.encoders:
        encoder.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        ids = torch.ones(8, 5, dtype=torch.int64)
        model(
            pixel_values=torch.zeros(8, 3, 32, 32), second_inputs={"input_ids": ids, "attention_mask": ids}
        ).loss.backward()
    assert count_step(shapes_of(model), config, captions)[0] == counter.get_total_flops()


def test_an_encoder_that_asks_for_numbers_is_said_and_left_out(built, caplog):
    config, model = built()
    source, _, _ = load_images(config)
    accelerator = build_accelerator("no", device="cpu")
    cost = step_cost(model, config, source, accelerator)
    assert cost.after(9.9) is None
    assert cost.after(10) is cost.found == StepCost(*count_step(shapes_of(model), config))
    model.encoder.layernorm.register_forward_hook(lambda *call: call[2] * call[2].sum().item())
    cost = step_cost(model, config, source, accelerator)
    with caplog.at_level("INFO"):
        assert cost.after(10) is cost.after(11) is None
    assert caplog.text.count("cannot be counted") == 1


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "fp32", 51e12),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156e12),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_device_and_the_precision_or_none(name, precision, expected):
    assert device_peak(name, precision) == expected


def test_the_share_of_the_peak_is_logged_and_shown():
    watch = Stopwatch(LateCost(lambda: StepCost(10**12, 10**11, 0.5, peak=2e12)), num_steps=4)
    accelerator = build_accelerator("no", device="cpu")
    watch.count(8, 1.0, 0)
    assert "flops_per_second" not in watch.read(accelerator)
    watch.count(8, 1.0, 1)
    watch.count(8, 1.0, 2)
    watch.began, watch.started = watch.began - 11, watch.started - 11
    found = watch.read(accelerator)
    assert found["flops_per_second"] == pytest.approx(0.1e12, rel=0.05)
    assert found["mfu"] == found["flops_per_second"] / 2e12
    assert speed({"images_per_second": 1.6, "flops_per_second": 2e11, "mfu": 0.1}) == (
        "2 img/s 200 GFLOP/s (10% of the peak)"
    )
    assert speed({"images_per_second": 1.6}) == "2 img/s"


def test_a_run_says_what_its_steps_cost(built, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "COUNTED_AFTER_S", 0)
    config, model = built()
    result = pretrain(
        **tiny_recipe | {"data": config.run.train_dir, "out": tmp_path / "run", "batch_size": 8, "max_steps": 2}
    )
    flops, _ = count_step(shapes_of(model), config)
    first, *_ = read_log(tmp_path / "run" / LOG_FILE)
    assert first["flops_per_second"] / first["images_per_second"] == pytest.approx(flops / 8)
    assert result.results["flops_per_step"] == flops
    assert f"| products of matrices | {in_flops(flops)} a step, " in (tmp_path / "run" / "README.md").read_text()
    assert compute(2_000_000, [{"flops_per_second": 3.0, "mfu": 0.25}]) == (
        "2 MFLOP a step, 3 FLOP/s, 25% of the devices' peak (medians of the log)"
    )
