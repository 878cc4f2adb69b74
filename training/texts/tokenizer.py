"""The tokenizer of a run's captions: stored, of a checkpoint, or made from the captions."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
PAD, START, END = "[PAD]", "[CLS]", "[SEP]"


def run_tokenizer(
    folder: Path | None, source: str | None, config: PreTrainedConfig, texts: Sequence[Sequence[str]]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run: the one it has stored, that of its text model, or one made from the captions.

    Args:
        folder: The run's, if it is resumed.
        source: Folder or Hub id of the text model, if it has weights.
        config: Of the text encoder.
        texts: The training captions.

    Raises:
        InputError: No tokenizer there, or one that does not go with the text encoder.
    """
    if getattr(config, "vocab_size", None) is None:
        raise InputError(f"`second_model.model_type`: expected an encoder of texts, got {config.model_type!r}.")
    if folder is not None and (folder / TOKENIZER).exists():
        tokenizer = load_tokenizer(str(folder), "output_dir")
    elif source is not None:
        tokenizer = load_tokenizer(source, "text_model")
    else:
        pad = getattr(config, "pad_token_id", None) or 0
        tokenizer = build_tokenizer([one for row in texts for one in row], config.vocab_size, pad)
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    check_vocabulary(tokenizer, config, said=source is not None)
    return tokenizer


def load_tokenizer(name: str, field: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or on the Hub; code that lies beside it is not run.

    Raises:
        InputError: None there, or one that cannot pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library raises dozens of kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"`{field}`: expected a tokenizer in {name}, got none that can be read: {reason}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what is made where there is no file of one
        raise InputError(f"`{field}`: expected a tokenizer in {name}, found none; store it beside the weights.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"`{field}`: expected a tokenizer with a padding token in {name}, it has none.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, said: bool) -> None:
    """Hold a tokenizer against its text encoder's vocabulary; one that is shorter is mentioned if it is to be `said`.

    Raises:
        InputError: It has tokens that the encoder does not know.
    """
    tokens, known = len(tokenizer), config.vocab_size
    if tokens > known:
        raise InputError(
            f"`text_model`: expected a tokenizer of at most the {known} tokens of its {config.model_type}, got "
            f"{tokens}; give the two that belong together."
        )
    if tokens < known and said:
        logger.warning("the tokenizer has %d tokens, its model %d: the others are never used", tokens, known)


def build_tokenizer(texts: Sequence[str], vocab_size: int, pad_token_id: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and of what is frequent in the texts, in small letters; it takes any text.

    Source: Sennrich et al. 2015, byte-pair encoding (arXiv 1508.07909), over bytes as in GPT-2.

    Args:
        texts: To make it from.
        vocab_size: Most tokens, at least 260: bytes and special tokens.
        pad_token_id: Where the text encoder looks for padding, 0 to 2.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [START, END]
    special.insert(pad_token_id if 0 <= pad_token_id <= 2 else 0, PAD)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(one, tokenizer.token_to_id(one)) for one in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        cls_token=START,
        sep_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )
