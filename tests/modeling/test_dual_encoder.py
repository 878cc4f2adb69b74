"""The model of images and texts: padding, Auto classes, what a tokenizer gives too much, and what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoModelForZeroShotImageClassification, BertConfig

from hf_vicreg import VicRegConfig, VicRegDualEncoder, VicRegDualEncoderConfig, VicRegForPreTraining
from hf_vicreg.modeling.contrastive_loss import contrastive_loss

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "tile_size": 1,
}
SMALL_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXTS = {
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "bert": {"model_type": "bert", **SMALL_BERT},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
}
IDS = torch.tensor([[1, 7, 9, 2], [1, 8, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture(params=list(TEXTS))
def model(request):
    config = VicRegDualEncoderConfig(
        vision_config=VISION,
        text_config=TEXTS[request.param] | {"vocab_size": 40},
        vision_projection_sizes=[20, 12],
        text_projection_sizes=[12],
    )
    return VicRegDualEncoder(config).eval()


def test_padding_of_texts_changes_nothing(model):
    alone = [
        model.get_text_features(row[mask.bool()][None], mask[mask.bool()][None]).pooler_output
        for row, mask in zip(IDS, MASK, strict=True)
    ]
    for more in (0, 5):
        ids, mask = (torch.nn.functional.pad(one, (0, more)) for one in (IDS, MASK))
        found = model.get_text_features(ids, mask).pooler_output
        torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)
    unmasked = model.get_text_features(IDS).pooler_output
    bert = model.config.text_config.model_type == "bert"  # attends to what is not masked; so does the pooled token
    assert bert or not torch.allclose(unmasked[1], alone[1][0], atol=1e-4)


def test_both_auto_classes_give_equal_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "input_ids": IDS, "attention_mask": MASK}
    # of a tokenizer of BERT's kind, whose other encoders do not know it
    outputs = model(**inputs, token_type_ids=torch.zeros_like(IDS))
    assert outputs.logits_per_image.shape == (3, 2)
    assert torch.equal(outputs.logits_per_image, outputs.logits_per_text.T)
    cosines = outputs.image_embeds @ outputs.text_embeds.T
    torch.testing.assert_close(outputs.logits_per_image, cosines * model.logit_scale.exp())
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is VicRegDualEncoder
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert model(input_ids=IDS).logits_per_image is None
    with pytest.raises(ValueError, match="`pixel_values`, `input_ids`: expected one"):
        model()


@pytest.mark.parametrize("pair_loss", ["vicreg", "siglip"])
def test_it_is_made_of_a_pretraining_and_that_survives_being_saved(pair_loss, tmp_path):
    config = VicRegConfig(
        encoder=VISION, second_encoder=TEXTS["distilbert"], expander_sizes=[20, 12], pair_loss=pair_loss
    )
    wrapper = VicRegForPreTraining(config)
    wrapper.save_pretrained(tmp_path)
    loaded = VicRegForPreTraining.from_pretrained(tmp_path)
    for name, tensor in wrapper.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    state = torch.get_rng_state()
    dual = VicRegDualEncoder.from_pretraining(wrapper)
    assert torch.equal(torch.get_rng_state(), state)  # a run that looks at itself stays the same run
    assert dual.text_model is wrapper.second_encoder
    assert dual.logit_scale.item() == pytest.approx(2.302585 if pair_loss == "siglip" else 2.6592, abs=1e-4)
    with pytest.raises(ValueError, match="expected a `second_encoder` of texts"):
        VicRegDualEncoder.from_pretraining(VicRegForPreTraining(VicRegConfig(encoder=VISION, expander_sizes=[8])))


@pytest.mark.parametrize("pair_loss", ["infonce", "siglip"])
def test_a_scale_that_grew_too_large_can_come_back(pair_loss):
    config = VicRegConfig(
        encoder=VISION, second_encoder=TEXTS["distilbert"], expander_sizes=[20, 12], pair_loss=pair_loss
    )
    model = VicRegForPreTraining(config)
    with torch.no_grad():
        model.logit_scale.fill_(5.0)  # e^5 is 148, and 100 the largest
    model.end_step()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
    torch.manual_seed(0)
    z_a, z_b = torch.randn(2, 6, 12)
    contrastive_loss(z_a, z_b, model.logit_scale, model.logit_bias, kind=pair_loss).backward()
    assert model.logit_scale.grad.abs() > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        StrictDataclassClassValidationError, match="expected embeddings as wide as those of images, 12, got 8"
    ):
        VicRegDualEncoderConfig(vision_projection_sizes=[12], text_projection_sizes=[8])
    with pytest.raises(
        StrictDataclassClassValidationError, match="`projection_norm`: expected 'batch' or 'layer', got 'none'"
    ):
        VicRegDualEncoderConfig(projection_norm="none")
    with pytest.raises(ValueError, match="`text_config`: expected a configuration"):
        VicRegDualEncoderConfig(text_config=3)
    with pytest.raises(ValueError, match="`pair_loss`: expected 'vicreg' without a `second_encoder`"):
        VicRegForPreTraining(VicRegConfig(encoder=VISION, pair_loss="infonce"))
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 4\) and 'infonce'"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(()))
    assert isinstance(VicRegDualEncoderConfig(text_config=BertConfig()).text_config, BertConfig)
