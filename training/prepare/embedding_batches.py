"""Images encoded batch after batch for `hf-vicreg embed`, so that decoding does not hold up the forward pass.

Loader processes decode and preprocess. On a GPU this process encodes what they give; on a CPU they encode as well,
each with one thread: no core waits for another, and a batch has the same bits whatever the number of processes.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hf_vicreg.training.evaluation.encoder import VisionEncoder, plain_image
from hf_vicreg.training.evaluation.features import pixels_of
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.decoding import MAX_PIXELS, UnusableImage, decode
from hf_vicreg.training.images.image_source import NOT_READ, ImageSource, digest_of
from hf_vicreg.training.launch.signals import end_workers, outlive_signals
from hf_vicreg.training.prepare.arguments import EmbedArguments


@dataclass(frozen=True)
class Form:
    """What an image becomes.

    Attributes:
        dtype: `float32` or `float16`, of the embedding.
        size: Numbers of an embedding.
        tokens: (rows, columns, hidden_size) of its patch tokens, or None where they are not asked for.
        inner: Numbers of each of its `inner_features`; none where they are not asked for, or the model has none.
    """

    dtype: str
    size: int
    tokens: tuple[int, ...] | None
    inner: tuple[int, ...] = ()


class Batch(NamedTuple):
    """A batch on its way; `values` are first the images' pixels, then their embeddings.

    Attributes:
        digests: One of each image, readable or not.
        indices: Of the readable images, in the source.
        sizes: Their (height, width) in pixels, before anything was done to them.
        values: `(batch_size, ...)`, filled up with copies; None without a readable image.
        tokens: `(batch_size, rows, columns, hidden_size)` float16, where they are asked for.
        inner: `(batch_size, sum of Form.inner)` float32, the same.
    """

    digests: list[bytes]
    indices: list[int]
    sizes: list[tuple[int, int]]
    values: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    inner: torch.Tensor | None = None


def form_of(encoder: VisionEncoder, arguments: EmbedArguments) -> Form:
    """Return what an image becomes, found out with a grey one.

    Raises:
        InputError: The model has no token for each patch, and they are asked for.
    """
    pixels = encoder.processor([plain_image(encoder.processor)], return_tensors="pt")["pixel_values"]
    outputs = encoder.outputs(pixels, output_hidden_states=arguments.inner_layers)
    tokens = tuple(encoder.patch_tokens(outputs, *pixels.shape[-2:]).shape[1:]) if arguments.patch_tokens else None
    inner = encoder.inner_features(outputs) if arguments.inner_layers else []
    size = encoder.feature_of(outputs).shape[1]
    return Form(arguments.dtype, size, tokens, tuple(one.shape[1] for one in inner))


@torch.no_grad()
def _encoded(batch: Batch, encoder: VisionEncoder, form: Form) -> Batch:
    """Return the batch with embeddings in float32 and tokens, still on the model's device."""
    if batch.values is None:
        return batch
    outputs = encoder.outputs(batch.values, output_hidden_states=bool(form.inner))
    tokens = inner = None
    if form.inner:
        inner = torch.cat(encoder.inner_features(outputs), 1).float()
    if form.tokens is not None:
        tokens = encoder.patch_tokens(outputs, *batch.values.shape[-2:]).half().contiguous()
    return batch._replace(values=encoder.feature_of(outputs).float().contiguous(), tokens=tokens, inner=inner)


class _Batches(Dataset):
    """Batches by the range of their indices: pixels, or embeddings if there is an encoder to make them here."""

    def __init__(
        self, source: ImageSource, processor: Any, batch_size: int, encoder: VisionEncoder | None, form: Form
    ):
        self.source, self.processor, self.batch_size = source, processor, batch_size
        self.encoder, self.form = encoder, form

    def __getitem__(self, indices: range) -> Batch:
        digests, found = [], {}
        for index in indices:
            digest, image = self._read(index)
            digests.append(digest)
            if image is not None:
                found[index] = image
        sizes = [self._size(index, image) for index, image in found.items()]
        batch = Batch(digests, list(found), sizes)
        if found:
            batch = batch._replace(values=pixels_of(list(found.values()), self.processor, self.batch_size))
        return batch if self.encoder is None else _encoded(batch, self.encoder, self.form)

    def _read(self, index: int) -> tuple[bytes, Image.Image | None]:
        """Return an image's digest and the image, None if it cannot be used."""
        if isinstance(self.source, ChannelSource):
            return self.source.digest(index), self.source.read(index)
        try:
            encoded = self.source.read_bytes(index)
        except Exception:  # of a disk, of a table
            return NOT_READ, None
        try:
            return digest_of(encoded), decode(encoded, self.source.min_size)
        except UnusableImage:
            return digest_of(encoded), None

    def _size(self, index: int, image: Image.Image) -> tuple[int, int]:
        """Return an image's (height, width) in its file; one that is too large for memory was decoded smaller."""
        whole = image if image.width * image.height < MAX_PIXELS // 5 else self.source.header(index)
        return whole.height, whole.width


def embedded_batches(
    source: ImageSource,
    encoder: VisionEncoder,
    form: Form,
    batches: list[range],
    *,
    batch_size: int,
    num_workers: int,
) -> Generator[Batch, None, None]:
    """Yield the batches with their embeddings, in order, on the CPU.

    Args:
        source: The images.
        encoder: What encodes them.
        form: What an image becomes.
        batches: Indices of each batch.
        batch_size: Images encoded at once; shorter batches are filled up.
        num_workers: Loader processes; 0 is this process alone, with one thread if it is on a CPU.

    Yields:
        Batches whose `values` are `(readable images, size)` float32, and whose `tokens` are float16.
    """
    on_cpu = encoder.model.device.type == "cpu"
    num_workers, threads = min(num_workers, len(batches)), torch.get_num_threads()
    loader = DataLoader(
        _Batches(source, encoder.processor, batch_size, encoder if on_cpu else None, form),
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=outlive_signals,
        pin_memory=encoder.model.device.type == "cuda",
    )
    if on_cpu and not num_workers:
        torch.set_num_threads(1)
    loaded = iter(loader)
    try:
        pending = None
        for batch in loaded:
            if on_cpu:
                yield _on_cpu(batch)
                continue
            # the device has its next batch before this one is waited for
            encoded = _encoded(Batch(*batch), encoder, form)
            if pending is not None:
                yield _on_cpu(pending)
            pending = encoded
        if pending is not None:
            yield _on_cpu(pending)
    finally:
        end_workers(loaded)
        torch.set_num_threads(threads)


def _as_it_is(batch: Any) -> Any:
    return batch


def _on_cpu(batch: Batch) -> Batch:
    """Return the batch without the copies that filled it up."""
    count = len(batch.indices)
    found = (batch.values, batch.tokens, batch.inner)
    values, tokens, inner = (None if one is None else one[:count].cpu() for one in found)
    return batch._replace(values=values, tokens=tokens, inner=inner)
