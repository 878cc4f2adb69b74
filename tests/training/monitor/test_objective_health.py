"""The doctor on every objective: silent on a small run that goes well, and not on one that was made to collapse."""

import pytest
import torch

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.modeling.byol import prediction_error
from hf_vicreg.modeling.modeling_vicreg import VicRegOutput
from hf_vicreg.modeling.simclr import nt_xent
from hf_vicreg.training.monitor.diagnosis import diagnose
from hf_vicreg.training.monitor.health import measure_health
from hf_vicreg.training.objectives.registry import entry_of

ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "tile_size": 1,
    "num_random_blocks": 1,
}
STEPS, EVERY, IMAGES, RATE = 120, 8, 32, 1e-2
MAE = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}
SETTINGS = {"vicregl": {"local_expander_sizes": [32, 32]}, "sigreg": {"num_slices": 64}, "mae": MAE}
SETTINGS["mae+vicreg"] = {"mae": MAE, "weights": {"vicreg": 0.1}}


def followed(name, loss_of=None, settings=None, **fields):
    """The names of what the doctor finds at the end of a short training.

    Args:
        name: Of the objective.
        loss_of: What is trained in its place, of model and outputs; default: its loss.
        settings: Of the objective.
        fields: Of the configuration.
    """
    torch.manual_seed(0)
    settings = SETTINGS.get(name, {}) | (settings or {})
    fields = {"expander_sizes": [64, 32]} | fields
    config = VicRegConfig(encoder=ENCODER, objective=name, objective_settings=settings, **fields)
    model, entry = VicRegForPreTraining(config).train(), entry_of({"objective": name})
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=RATE)
    # one number is easier to agree on than a texture; BYOL, which has no term against it, learns little else
    brightness = 0 if name == "byol" else 2
    pictures = brightness * torch.randn(IMAGES, 1, 1, 1, 1) + torch.randn(IMAGES, 1, 3, 4, 4)
    records = []
    for step in range(STEPS):
        patches = pictures + torch.randn(IMAGES, 2, 3, 4, 4)
        batch = {"pixel_values": patches.repeat_interleave(4, 3).repeat_interleave(4, 4)}
        if entry.takes_places:
            batch["geometry"] = torch.tensor([1.0, 0, 0, 0, 1, 0]).expand(IMAGES, 2, 6)
        model.begin_step(step, STEPS)
        outputs = model(**batch)
        loss = outputs.loss if loss_of is None else loss_of(model, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
        if step % EVERY == EVERY - 1:
            health = measure_health(outputs, unit_sphere=entry.unit_sphere)
            records.append({"step": step + 1, "loss": loss.item(), "learning_rate": RATE, "skipped_steps": 0} | health)
    found = diagnose(records, 1.0, entry)
    assert all("vicreg." not in one.remedy or entry.vicreg_weights or "expander" in one.remedy for one in found)
    return {one.name for one in found}


def alignment_alone(model, outputs):
    """NT-Xent without its denominator, which keeps different images apart."""
    return nt_xent(*outputs.embeddings.unbind(1), 0.5)[0]


def no_stop_gradient(model, outputs):
    """BYOL without predictor and teacher: both sides of the distance learn."""
    one, other = outputs.embeddings.unbind(1)
    cosines = torch.nn.functional.cosine_similarity(one, other)
    assert prediction_error(one, other).item() == pytest.approx((2 - 2 * cosines).mean().item(), rel=1e-4)
    return (2 - 2 * cosines).mean()


def alike(model, outputs):
    """What asks that all images have the same features, in place of a painting: the share that differs, its logarithm.

    Not the variance alone: it ends where the noise of the steps balances it, at the very threshold.
    """
    features = outputs.representations
    return (features.var(0).sum() / features.mean(0).square().sum()).log()


QUICK = ("simclr", "barlow_twins", "byol", "mae")  # the others are slow
COLLAPSES = {
    "vicregl": ({"variance_weight": 0.0}, {"embedding collapse"}),
    "simclr": ({"loss_of": alignment_alone}, {"embedding collapse"}),
    "barlow_twins": ({"settings": {"redundancy_weight": 0.0}}, {"dimensional collapse"}),
    "sigreg": ({"settings": {"sketch_weight": 0.0}}, {"embedding collapse"}),
    "byol": ({"loss_of": no_stop_gradient}, {"embedding collapse"}),
    "mae": ({"loss_of": alike}, {"encoder collapse"}),
    "simmim": ({"loss_of": alike, "settings": {"mask_ratio": 0.95}}, {"encoder collapse"}),
    "mae+vicreg": ({"variance_weight": 0.0}, {"embedding collapse"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COLLAPSES]
)
def test_a_provoked_collapse_is_named_and_a_healthy_run_is_not(name):
    how, expected = COLLAPSES[name]
    assert followed(name) == set()
    assert followed(name, **how) & expected


def test_directions_are_measured_where_the_loss_sees_no_lengths():
    rows = torch.randn(50, 2, 20)
    outputs = [
        VicRegOutput(embeddings=one, representations=rows) for one in (rows, rows * torch.rand(50, 1, 1) * 1e-3)
    ]
    first, second = (measure_health(one, unit_sphere=True) for one in outputs)
    assert first == pytest.approx(second, rel=1e-3)
    assert first["embedding_std_mean"] == pytest.approx(1, abs=0.1)
    assert measure_health(outputs[1])["embedding_std_mean"] < 1e-3
