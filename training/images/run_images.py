"""The images of a run: those to train on, and those of its probes."""

from dataclasses import replace
from pathlib import Path

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource, as_channels
from hf_vicreg.training.images.channels.folders import channel_folder
from hf_vicreg.training.images.files.shard_stream import load_shards
from hf_vicreg.training.images.sources import ImageSource, dataset_source, load_sources, load_splits
from hf_vicreg.training.images.streaming import ImageStream, load_stream
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.places import is_shards
from hf_vicreg.training.texts.captions import fingerprint_of, read_captions, tokenised
from hf_vicreg.training.texts.tokenizer import run_tokenizer


def load_images(config: RunConfig) -> tuple[ImageSource | ImageStream, ImageSource | None, ImageSource | None]:
    """Return the images to train on and, where they are no stream, those of the k-NN: its bank and its queries.

    Raises:
        InputError: Nothing to train on.
    """
    run = config.run
    if run.streaming:
        name = run.dataset_name
        assert name is not None
        channels = (config.num_channels, run.pages) if config.reads_channels else (None, None)
        if is_shards(name):
            shards = load_shards(name, run.image_column_name or "", *channels)
            return shards.at_least(*smallest_side(config)), None, None
        stream = load_stream(name, run.dataset_config_name, run.train_split, run.image_column_name)
        return stream.with_channels(*channels).at_least(*smallest_side(config)), None, None
    if run.caption_column is not None:
        source, test = load_captioned(config)
        if config.reads_channels:
            source = as_channels(source, config.num_channels, run.pages)
            test = None if test is None else as_channels(test, config.num_channels, run.pages)
        return source.first(run.max_train_samples), source.for_probe(run.knn_train_samples), test
    if config.reads_channels and run.train_dir:
        photo = config.normalisation_kind == "photo"
        folder = channel_folder(run.train_dir, config.num_channels, run.pages, run.window, photo=photo)
        return folder.first(run.max_train_samples), folder.first(run.knn_train_samples), None
    source, test = load_sources(
        dataset_name=run.dataset_name,
        dataset_config_name=run.dataset_config_name,
        train_dir=run.train_dir,
        train_split=run.train_split,
        test_split=run.test_split,
        image_column_name=run.image_column_name,
        label_column_name=run.label_column_name,
    )
    if config.reads_channels:
        source = as_channels(source, config.num_channels, run.pages)
        test = None if test is None else as_channels(test, config.num_channels, run.pages)
    bank = source.for_probe(run.knn_train_samples)
    return source.first(run.max_train_samples), bank, test


def load_captioned(config: RunConfig) -> tuple[ImageSource, ImageSource | None]:
    """Return the images with captions to train on and, where there is such a split, those to test on.

    Raises:
        InputError: No captions, an unknown split or column, or a tokenizer that does not go with the text encoder.
    """
    run, text = config.run, config.vicreg.second_encoder
    columns = run.caption_column or []
    name = run.train_dir or run.dataset_name or ""
    splits = load_splits(name, run.dataset_config_name)
    for flag, split in (("train_split", run.train_split), ("test_split", run.test_split)):
        if split is not None and split not in splits:
            raise InputError(f"`{flag}`: expected one of {sorted(splits)} in {name}, got {split!r}.")
    others = [one for one in ("test", "validation") if one in splits and set(columns) <= set(splits[one].features)]
    test_split = run.test_split or next((one for one in others if one != run.train_split), None)
    found: list[ImageSource] = []
    tokenizer = None
    for split in (run.train_split, test_split):
        if split is None:
            continue
        rows, texts = read_captions(name, splits[split], columns, split)
        if tokenizer is None:
            stored = Path(run.output_dir) if run.resume_from_checkpoint is not None else None
            tokenizer = run_tokenizer(stored, run.text_model, text, texts)
        source = dataset_source(name, rows, run.image_column_name, run.label_column_name, said=bool(found))
        captions = tokenised(texts, tokenizer, text, run.max_text_length)
        fingerprint = f"{source.fingerprint}/{fingerprint_of(texts)}"
        found.append(replace(source, captions=captions, fingerprint=fingerprint))
    return found[0], found[1] if len(found) > 1 else None


def usable_images(source: ImageSource, config: RunConfig) -> ImageSource:
    """Return the same images, those smaller than a patch being unusable from now on.

    Raises:
        InputError: Not one of those looked at can be used.
    """
    source, field = source.at_least(*smallest_side(config)), "train_dir" if config.run.train_dir else "dataset_name"
    tried = source.sampled()
    if any(source.read(index) is not None for index in tried):
        return source
    readable = source.at_least(1, 1)
    small = next((index for index in tried if readable.read(index) is not None), None)
    if small is None:
        refusal = readable.refusal(0)
        if refusal is not None and (isinstance(readable, ChannelSource) or refusal.kind == "channels"):
            raise InputError(f"`{field}`: {readable.describe(0)}: {refusal}")
        raise InputError(
            f"`{field}`: expected readable images in {source.name}, found {len(tried)} of {len(tried)} corrupt, "
            f"{source.describe(0)} among them; check them."
        )
    image = readable.read(small)
    assert image is not None
    raise InputError(
        f"`{field}`: expected images of at least one patch {source.min_size} (height, width) in pixels, found "
        f"{(image.height, image.width)} in {source.describe(small)}; give larger images or a smaller "
        "--model.patch_size."
    )


def smallest_side(config: RunConfig) -> tuple[int, int]:
    """Return the smallest usable image: one patch, (height, width) in pixels; 1 for encoders without patches."""
    size = getattr(config.vicreg.encoder, "patch_size", None) or 1
    return (size, size) if isinstance(size, int) else tuple(size)
