"""Parameter groups, LARS against the formula, and the learning rate."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModel, ConvNextConfig, SiglipVisionConfig, SwinConfig

from hf_vicreg import BigBirdViTConfig, VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.engine.optim import (
    LARS,
    build_optimizer,
    layer_depths,
    learning_rate_at,
    num_layers,
    parameter_groups,
)
from hf_vicreg.training.engine.step import learning_rates
from hf_vicreg.training.engine.unseen import unseen_parameters

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}


def test_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.002
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert learning_rate_at(0, 1, 1.0, 0.0) == 1.0


def test_the_cosine_ends_at_the_least_learning_rate():
    rates = [learning_rate_at(step, 1000, 1.6, 0.1, least=0.002) for step in range(1000)]
    assert max(rates) == pytest.approx(1.6)
    assert min(rates[100:]) == rates[-1] == pytest.approx(0.002, abs=1e-5)
    assert rates[550] == pytest.approx((1.6 + 0.002) / 2)


def test_only_matrices_decay():
    model = VicRegForPreTraining(
        VicRegConfig(
            encoder=TINY | {"num_register_tokens": 2, "position_embedding_type": "absolute"}, expander_sizes=[8, 8]
        )
    )
    decayed, exempt = (group["params"] for group in parameter_groups(model, 0.05))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(exempt) == len(names) - len(unseen_parameters(model))
    exempt_names = {names[parameter] for parameter in exempt}
    learned = {f"encoder.embeddings.{name}" for name in ("cls_token", "register_tokens", "position_embeddings")}
    assert learned <= exempt_names
    assert all(names[parameter].endswith("weight") and parameter.ndim >= 2 for parameter in decayed)
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05, (0.9, 0.95))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def lars_formula(parameters, gradients, momenta, lr, weight_decay, momentum=0.9, eta=1e-3):
    """One update as facebookresearch/vicreg computes it, written out for each parameter; in place."""
    for parameter, gradient, buffer in zip(parameters, gradients, momenta, strict=True):
        direction = gradient.clone()
        if parameter.ndim != 1:
            direction += weight_decay * parameter
            own, update = parameter.norm().item(), direction.norm().item()
            if own > 0 and update > 0:
                direction *= eta * own / update
        buffer.mul_(momentum).add_(direction)
        parameter.sub_(lr * buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("weight_decay", [1e-6, 1e-2])
def test_lars_is_the_authors(weight_decay, dtype):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 6),
        torch.nn.Linear(6, 4),
    ).to(dtype)
    torch.nn.init.zeros_(model[5].weight)  # a norm of 0 does not adapt
    frozen = torch.nn.Parameter(torch.ones(2, 2))  # has no gradient
    parameters = list(model.parameters())
    expected = [one.detach().clone() for one in parameters]
    momenta = [torch.zeros_like(one) for one in expected]
    optimizer = LARS([*parameters, frozen], lr=0.0, weight_decay=weight_decay)
    start = [one.clone() for one in expected]
    for step in range(50):
        lr = learning_rate_at(step, 50, 0.4, 0.1, least=0.0004)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (model(torch.randn(16, 3, 4, 4, dtype=dtype)) - torch.randn(16, 4, dtype=dtype)).square().mean().backward()
        gradients = [one.grad.clone() for one in parameters]
        optimizer.step()
        lars_formula(expected, gradients, momenta, lr, weight_decay)
    for found, one, before in zip(parameters, expected, start, strict=True):
        assert (one - before).norm() > 1e-3  # it went somewhere
        assert ((found - one).norm() / one.norm()).item() < 1e-6
    assert torch.equal(frozen, torch.ones(2, 2))


def test_lars_can_be_saved_and_goes_on(tmp_path):
    model = torch.nn.Linear(3, 3)
    one, other = (build_optimizer(model, "lars", 0.1, 1e-6, (0.9, 0.95)) for _ in range(2))
    assert [group["weight_decay"] for group in one.param_groups] == [1e-6, 0.0]
    model(torch.randn(4, 3)).square().sum().backward()
    one.step()
    other.load_state_dict(one.state_dict())
    for buffer, loaded in zip(one.state.values(), other.state.values(), strict=True):
        assert torch.equal(buffer["momentum_buffer"], loaded["momentum_buffer"])


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
OURS = {"model_type": "bigbird_vit", "image_size": 32, "patch_size": 8, "tile_size": 1, **SHAPE}
VIT = {"image_size": 32, "patch_size": 8, **SHAPE}
WRAPPERS = {
    "rope": {"encoder": OURS},
    "absolute": {"encoder": OURS | {"position_embedding_type": "absolute", "num_register_tokens": 1}},
    "cls": {"encoder": OURS | {"pooling": "cls"}},
    "pooler": {"encoder": OURS | {"pooler_act": "tanh"}},
    "layer-norm": {"encoder": OURS, "expander_norm": "layer"},
    "one-layer": {"encoder": OURS, "expander_sizes": [12]},
    "three-layers": {"encoder": OURS, "expander_sizes": [12, 10, 12]},
    "two-branches": {"encoder": OURS, "second_encoder": OURS | {"position_embedding_type": "absolute"}},
    "two-branches-one-layer": {"encoder": OURS, "second_encoder": OURS, "expander_sizes": [12]},
    "beside-a-decoder": {"encoder": OURS, "objective": "mae+vicreg"},
    "beside-a-teacher": {"encoder": OURS, "objective": "byol+vicreg"},
    "vit": {"encoder": {"model_type": "vit", **VIT}},
    "dinov2": {"encoder": {"model_type": "dinov2", "mlp_ratio": 1, **VIT}},
    "dinov3": {"encoder": {"model_type": "dinov3_vit", "num_register_tokens": 1, **VIT}},
    "siglip": {"encoder": {"model_type": "siglip_vision_model", **VIT}},
    "convnext": {"encoder": {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}},
    "resnet": {"encoder": {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}},
}


@pytest.mark.parametrize("fields", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_left_out_is_what_the_loss_does_not_see(fields):
    """The rule of structure against gradients in double precision, whose noise is 1e-16 of the others' size."""
    model = VicRegForPreTraining(VicRegConfig(**{"expander_sizes": [12, 12], **fields})).double().train()
    with torch.no_grad():  # away from zeros and ones, where more than the structure says is unseen
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model(torch.randn(8, 2, 3, 32, 32, dtype=torch.float64)).loss.backward()
    sizes = {name: one.grad.norm().item() for name, one in model.named_parameters() if one.grad is not None}
    largest = max(sizes.values())
    unseen = set(unseen_parameters(model))
    assert {name for name, size in sizes.items() if size < 1e-11 * largest} == unseen
    held = {parameter for group in parameter_groups(model, 0.1) for parameter in group["params"]}
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in learning.items() if parameter not in held} == unseen


def test_unseen_parameters_are_said_once_and_do_not_move(caplog):
    model = VicRegForPreTraining(VicRegConfig(encoder=OURS, expander_sizes=[12, 12])).train()
    with caplog.at_level("INFO", logger="hf_vicreg.training.engine.optim"):
        optimizer = build_optimizer(model, "adamw", 1e-2, 0.05, (0.9, 0.95))
    assert [one.getMessage() for one in caplog.records] == [
        "2 biases make no difference to the loss and are not trained: encoder.layernorm.bias, expander.hidden.0.bias"
    ]
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    model(torch.randn(8, 2, 3, 32, 32)).loss.backward()
    optimizer.step()
    still = {name for name, one in model.named_parameters() if torch.equal(before[name], one)}
    assert still == set(unseen_parameters(model))


@pytest.mark.parametrize("optim", ["adamw", "lars"])
def test_checkpoints_from_when_all_were_optimised_are_read(optim):
    model = VicRegForPreTraining(VicRegConfig(encoder=OURS, expander_sizes=[12, 12])).train()
    model(torch.randn(8, 2, 3, 32, 32)).loss.backward()
    # the groups of before: all parameters, the table of no registers after CLS
    empty = torch.nn.Parameter(torch.zeros(1, 0, 16))
    empty.grad = torch.zeros_like(empty)
    groups = [{"params": [], "weight_decay": 0.05}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[parameter.ndim < 2 or name.endswith("_token")]["params"].append(parameter)
        if name == "encoder.embeddings.cls_token":
            groups[1]["params"].append(empty)
    old = LARS(groups, lr=0.1) if optim == "lars" else torch.optim.AdamW(groups, lr=0.1)
    old.step()
    kind = "momentum_buffer" if optim == "lars" else "exp_avg"
    new = build_optimizer(model, optim, 1e-3, 0.05, (0.9, 0.95))
    new.load_state_dict({"state": old.state_dict()["state"], "param_groups": new.state_dict()["param_groups"]})
    held = [parameter for group in new.param_groups for parameter in group["params"]]
    assert len(new.state) == len(held)
    for parameter in held:
        assert torch.equal(new.state[parameter][kind], old.state[parameter][kind])
    again = build_optimizer(model, optim, 1e-3, 0.05, (0.9, 0.95))
    again.load_state_dict(new.state_dict())
    assert all(torch.equal(again.state[parameter][kind], new.state[parameter][kind]) for parameter in held)


def test_layers_of_an_encoder_learn_slower_the_deeper_they_lie():
    encoder = {"model_type": "bigbird_vit", "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
    stage = "encoder.stages.1"
    other = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    for first, scales in (
        (
            encoder | {"intermediate_size": 16},
            {"embeddings.cls_token": 4, "encoder.layer.0.norm1.weight": 3, "encoder.layer.2.mlp.fc2.weight": 1}
            | {"layernorm.weight": 0},
        ),
        (
            other,
            {"embedder.embedder.convolution.weight": 3, f"{stage}.layers.0.layer.0.convolution.weight": 1},
        ),
    ):
        model = VicRegForPreTraining(VicRegConfig(encoder=first, second_encoder=other, expander_sizes=[8, 8]))
        optimizer = build_optimizer(model, "adamw", 1e-2, 0.05, (0.9, 0.95), 0.5)
        learning_rates(optimizer, 1e-2)
        held = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        assert len(held) == sum(map(len, (group["params"] for group in parameter_groups(model, 0.05))))
        for name, power in scales.items():
            assert held[id(model.get_parameter(f"encoder.{name}"))]["lr"] == pytest.approx(1e-2 * 0.5**power), name
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder.") and id(parameter) in held:
                assert held[id(parameter)]["lr"] == 1e-2, name  # new weights


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (
            ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 3, 1], num_channels=3),
            {"embeddings.patch_embeddings.weight": 5, "encoder.stages.0.layers.0.dwconv.weight": 4}
            | {"encoder.stages.2.layers.2.dwconv.weight": 2, "encoder.stages.3.layers.0.dwconv.weight": 1},
        ),
        (
            BigBirdViTConfig(**TINY, patch_size=16, patch_embedding="conv"),
            {"embeddings.cls_token": 2, "encoder.layer.0.mlp.fc2.weight": 1, "layernorm.weight": 0},
        ),
    ],
    ids=["stages-of-blocks", "a-stem-longer-than-the-layers"],
)
def test_layers_are_the_outer_ones_behind_the_embeddings(config, scales):
    model = AutoModel.from_config(config)
    depths, count = layer_depths(model), num_layers(model)
    assert {name: count + 1 - depths[name] for name in scales} == scales


@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1]),
        SiglipVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1),
    ],
)
def test_positions_of_other_makers_do_not_decay(config):
    model = AutoModel.from_config(config)
    exempt = {id(one) for one in parameter_groups(model, 0.05)[1]["params"]}
    positions = [one for name, one in model.named_parameters() if "position" in name and one.ndim > 1]
    assert positions
    assert all(id(one) in exempt for one in positions)


def test_the_schedule_begins_after_the_expanders_own_steps():
    alone = [learning_rate_at(step, 80, 2.0, 0.1, 0.5) for step in range(80)]
    rates = [learning_rate_at(step, 100, 2.0, 0.1, 0.5, 0.2) for step in range(100)]
    assert rates[20:] == alone
    assert rates[:20] == [1.0, 2.0, *[2.0] * 18]
    assert learning_rate_at(0, 100, 2.0, 0.0, 0.0, 0.2) == 2.0


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_expanders_learn_at_their_own_rate(layer_decay):
    encoder = {"model_type": "bigbird_vit", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = VicRegConfig(encoder=encoder, second_encoder=encoder, expander_sizes=[8, 8])
    model = VicRegForPreTraining(config)
    whole, slow = (build_optimizer(model, "adamw", 1e-2, 0.05, (0.9, 0.95), layer_decay, one) for one in (1.0, 0.1))
    rates = []
    for optimizer in (whole, slow):
        learning_rates(optimizer, 1e-2)
        rates.append({id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]})
        assert len(rates[-1]) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert rates[0].keys() == rates[1].keys()
    for name, parameter in model.named_parameters():
        if id(parameter) in rates[0]:
            factor = 0.1 if name.startswith(("expander.", "second_expander.")) else 1.0
            assert rates[1][id(parameter)] == pytest.approx(factor * rates[0][id(parameter)]), name
