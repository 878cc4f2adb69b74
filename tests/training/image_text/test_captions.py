"""Captions: read, tokenised, drawn, padded; what of them is left out, and what is refused."""

import random

import datasets
import pytest
from transformers import AutoConfig, AutoModel, BertConfig, DistilBertConfig, SiglipTextConfig
from transformers.models.auto import CONFIG_MAPPING

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.texts.captions import POSITIONS_AFTER_PADDING, read_captions, tokenised
from hf_vicreg.training.texts.tokenizer import build_tokenizer, check_vocabulary, load_tokenizer, run_tokenizer

TEXTS = [["a red wall"], ["a blue, very blue wall", "eine blaue Wand"], ["猫が二匹 🐈"]]


def rows(**columns):
    return datasets.Dataset.from_dict(columns)


def test_rows_without_a_caption_are_left_out_and_counted(caplog):
    data = rows(en=["a  cat", None, "  ", "dog"], de=[["eine Katze", "Katze"], None, [], [" ", "Hund"]])
    kept, texts = read_captions("pets", data, ["en", "de"], "train")
    assert texts == [["a cat", "eine Katze", "Katze"], ["dog", "Hund"]]
    assert kept["en"] == ["a  cat", "dog"]
    assert "2 of 4 images of 'train' have no caption and are left out" in caplog.text


def test_bad_columns_are_told_in_one_line():
    for data, columns, message in (
        (rows(text=["a"]), ["caption"], r"expected one of \['text'\] in split 'train' of pets, got 'caption'"),
        (rows(text=[1, 2]), ["text"], "expected texts in column 'text' of pets, got '1' in row 0 of 'train'"),
        (rows(text=[["a"], [None]]), ["text"], None),
        (rows(text=["", None]), ["text"], "all 2 rows of 'train' have none"),
    ):
        if message is None:
            assert read_captions("pets", data, columns, "train")[1] == [["a"]]
            continue
        with pytest.raises(InputError, match=message) as raised:
            read_captions("pets", data, columns, "train")
        assert "\n" not in str(raised.value)


def test_a_tokenizer_is_made_of_the_captions_and_takes_any_text():
    flat = [one for row in TEXTS for one in row]
    tokenizer = build_tokenizer(flat, 400)
    assert tokenizer.backend_tokenizer.to_str() == build_tokenizer(flat, 400).backend_tokenizer.to_str()
    assert tokenizer.pad_token_id == 0
    assert build_tokenizer(flat, 400, pad_token_id=1).pad_token_id == 1
    for text in (*flat, "Ein grüner Würfel, 30 €"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text.lower()
    assert tokenizer("A RED wall")["input_ids"] == tokenizer("a red wall")["input_ids"]


def test_captions_are_drawn_by_key_and_padded():
    config, texts = DistilBertConfig(vocab_size=262, max_position_embeddings=9), [["a b"], ["c", "d"], ["a long text"]]
    captions = tokenised(texts, run_tokenizer(None, None, config, texts), config, limit=64)
    drawn = [captions.draw(1, random.Random(f"0/{epoch}/1/caption")) for epoch in range(20)]
    assert {tuple(one) for one in drawn} == {tuple(one) for one in captions.tokens[1]}
    batch = captions.batch([captions.tokens[0][0], captions.tokens[2][0]])
    assert batch["input_ids"].shape == (2, 9)  # the encoder's longest
    assert batch["attention_mask"].sum(1).tolist() == [len(captions.tokens[0][0]), 9]
    assert batch["input_ids"][0, -1] == 0


def test_a_tokenizer_has_to_go_with_its_model(tmp_path, caplog):
    tokenizer = build_tokenizer(["a red wall"], 300)
    check_vocabulary(tokenizer, BertConfig(vocab_size=1000), said=True)
    assert f"the tokenizer has {len(tokenizer)} tokens, its model 1000" in caplog.text
    with pytest.raises(InputError, match=r"expected a tokenizer of at most the 50 tokens of its bert, got"):
        check_vocabulary(tokenizer, BertConfig(vocab_size=50), said=True)
    with pytest.raises(InputError, match=r"`text_model`: expected a tokenizer in .*, got none that can be read"):
        load_tokenizer(str(tmp_path), "text_model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a tokenizer with a padding token"):
        load_tokenizer(str(tmp_path), "text_model")


@pytest.mark.parametrize("kind", sorted(POSITIONS_AFTER_PADDING & set(CONFIG_MAPPING)))
def test_the_longest_text_has_positions_enough(kind):
    """Those of RoBERTa's family begin behind that of padding."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(kind, **sizes, vocab_size=300, max_position_embeddings=24)
    if kind == "longformer":
        config.attention_window = [4]
    texts = [["a b c d e f g h i j k l m n o p q r s t u v w x y z"]]
    tokenizer = run_tokenizer(None, None, config, texts)
    captions = tokenised(texts, tokenizer, config, 64)
    assert len(captions.tokens[0][0]) < 24
    batch = captions.batch(captions.tokens[0])
    assert AutoModel.from_config(config)(**batch).last_hidden_state.isfinite().all()


def test_a_siglip_text_is_given_as_it_was_trained():
    """At one length, and padding is looked at like any other token."""
    config = SiglipTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    tokenizer = build_tokenizer(["a red wall"], 300, 1)
    captions = tokenised([["a red wall"]], tokenizer, config, 16)
    batch = captions.batch(captions.tokens[0])
    assert {name: tuple(one.shape) for name, one in batch.items()} == dict.fromkeys(batch, (1, 64))
    assert batch["attention_mask"].all()
