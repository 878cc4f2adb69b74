"""A captioner from a pretrained encoder: `VisionEncoderDecoderModel` with a small decoder and tokens of its own."""

from collections.abc import Sequence

from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    BaseImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
)

from hf_vicreg.training.engine.encoders import add_adapters
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_vision_encoder
from hf_vicreg.training.tasks.arguments import CaptioningArguments

ENCODER = "encoder."
PAD, START, END = "<pad>", "<s>", "</s>"


def build_tokenizer(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and of what is frequent in the captions, which takes any text.

    Source: Sennrich et al. 2015, byte-pair encoding (arXiv 1508.07909), over bytes as in GPT-2.

    Args:
        captions: Texts to make it from.
        vocab_size: Most tokens, at least 259: bytes and special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END)


def build_captioner(
    name: str, tokenizer: PreTrainedTokenizerFast, arguments: CaptioningArguments
) -> tuple[VisionEncoderDecoderModel, BaseImageProcessor]:
    """Return a captioner with the pretrained encoder's weights and a new decoder, and the encoder's processor.

    The decoder is GPT-2's with attention to the encoder's tokens.

    Args:
        name: Folder or Hub id of any vision encoder that returns tokens.
        tokenizer: Of the captions.
        arguments: Sizes of the decoder.

    Raises:
        InputError: No vision encoder there, or one that returns maps instead of tokens.
    """
    encoder = load_vision_encoder(name)
    model = encoder.model.cpu()
    model.config.name_or_path = encoder.name  # it is saved, and folders of this machine are nobody's business
    if getattr(model.config, "hidden_size", None) is None:
        raise InputError(
            f"`MODEL`: expected an encoder that returns tokens, as ViTs do, got one of type "
            f"{model.config.model_type!r}."
        )
    set_seed(arguments.seed)
    if arguments.from_scratch:
        model = AutoModel.from_config(model.config)
    width = arguments.decoder_hidden_size
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=arguments.max_target_length,
            n_embd=width,
            n_layer=arguments.decoder_layers,
            n_head=width // 64 if width % 64 == 0 else width // 32,
            is_decoder=True,
            add_cross_attention=True,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    captioner = VisionEncoderDecoderModel(encoder=model, decoder=decoder)
    if arguments.lora_rank:
        add_adapters(captioner.encoder, arguments.lora_rank)
    for config in (captioner.config, captioner.generation_config):
        config.decoder_start_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    captioner.generation_config.bos_token_id = tokenizer.bos_token_id
    captioner.generation_config.max_length = arguments.max_target_length
    return captioner, encoder.processor


def learning_rate_scale(parameter: str, encoder_ratio: float) -> float:
    """Return the factor on the learning rate of a captioner's parameter, by its name."""
    return encoder_ratio if parameter.startswith(ENCODER) else 1.0
