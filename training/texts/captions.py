"""Captions of images: read from columns of a data set, made into tokens, drawn and padded for a batch."""

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

# SigLIP's text models pool the last token, padding or not: each text has the length they were trained on, and no mask
FIXED_LENGTHS = {"siglip_text_model": 64, "siglip2_text_model": 64}
# of RoBERTa's family the first position is that behind padding's number
POSITIONS_AFTER_PADDING = frozenset(
    ("camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta")
)


@dataclass(frozen=True)
class Captions:
    """Captions of the images of a source, by their index. Can be pickled, for loader processes.

    Attributes:
        texts: At least one for each image.
        tokens: The same as token ids.
        tokenizer: What made them.
        length: All texts are padded to so many tokens; None: to the longest of a batch.
    """

    texts: list[list[str]]
    tokens: list[list[list[int]]]
    tokenizer: PreTrainedTokenizerBase
    length: int | None = None

    def draw(self, index: int, rng: random.Random) -> list[int]:
        """Return the tokens of one of an image's captions, each as likely as the others."""
        return rng.choice(self.tokens[index])

    def batch(self, tokens: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` `(texts, tokens)` int64."""
        longest = self.length or max(len(one) for one in tokens)
        pad = self.tokenizer.pad_token_id
        ids = [one + [pad] * (longest - len(one)) for one in tokens]
        seen = [longest if self.length else len(one) for one in tokens]
        mask = [[1] * one + [0] * (longest - one) for one in seen]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def read_captions(name: str, rows: Any, columns: Sequence[str], split: str) -> tuple[Any, list[list[str]]]:
    """Return the rows of a split that have a caption, and the captions of each, white space made single.

    Args:
        name: Of the data set.
        rows: A `datasets.Dataset`.
        columns: Each of text, or of lists of texts; an empty one is as good as none.
        split: Its name.

    Raises:
        InputError: No such column, a column of something else, or no caption at all.
    """
    texts: list[list[str]] = [[] for _ in range(len(rows))]
    for column in columns:
        if column not in rows.features:
            raise InputError(
                f"`caption_column`: expected one of {sorted(rows.features)} in split {split!r} of {name}, got "
                f"{column!r}; a folder of images has its captions in metadata.csv, beside `file_name`."
            )
        for row, value in enumerate(rows.select_columns([column])[column]):
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                if one is not None and not isinstance(one, str):
                    raise InputError(
                        f"`caption_column`: expected texts in column {column!r} of {name}, got {str(one)[:60]!r} in "
                        f"row {row} of {split!r}."
                    )
                if one and one.strip():
                    texts[row].append(" ".join(one.split()))
    kept = [row for row, found in enumerate(texts) if found]
    if not kept:
        raise InputError(
            f"`caption_column`: expected captions in {list(columns)} of {name}, all {len(rows)} rows of {split!r} "
            "have none."
        )
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d images of %r have no caption and are left out", len(rows) - len(kept), len(rows), split
        )
        rows = rows.select(kept)
    return rows, [texts[row] for row in kept]


def fingerprint_of(texts: Sequence[Sequence[str]]) -> str:
    """Return what changes with any caption and with their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def tokenised(
    texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, limit: int
) -> Captions:
    """Return captions with their tokens.

    Args:
        texts: At least one for each image.
        tokenizer: Of the text encoder.
        config: The text encoder's.
        limit: Longest text in tokens; longer ones are cut.
    """
    positions = getattr(config, "max_position_embeddings", None) or limit
    if config.model_type in POSITIONS_AFTER_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    most = [limit, tokenizer.model_max_length, positions]
    length = FIXED_LENGTHS.get(config.model_type)
    flat = [one for row in texts for one in row]
    ids = iter(tokenizer(flat, truncation=True, max_length=length or min(most))["input_ids"])
    if tokenizer.is_fast:  # it would be stored that way
        tokenizer.backend_tokenizer.no_truncation()
    return Captions(texts, [[next(ids) for _ in row] for row in texts], tokenizer, length)
