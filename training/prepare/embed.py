"""The embeddings of a set of images as a parquet data set: `hf-vicreg embed IMAGES MODEL OUT`.

A shard covers a fixed range of the source's images, one process makes it, and it is written aside, flushed and
renamed. So the rows are the same whatever the number of processes, and after a kill the same command goes on behind
the shards that are there. `embedding.json` says of which model and images they are; it is there before any of them.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from huggingface_hub import constants

from hf_vicreg.training.errors import InputError, RunStopped, blamed_on
from hf_vicreg.training.evaluation.encoder import VisionEncoder, load_vision_encoder, source_for
from hf_vicreg.training.evaluation.features import same_model
from hf_vicreg.training.images.channels.folders import channel_folder
from hf_vicreg.training.images.sources import ImageSource, dataset_source, load_sources, load_splits
from hf_vicreg.training.images.unusable import none_readable, write_unusable
from hf_vicreg.training.launch.distributed import build_accelerator, check_device, run_on_main
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.prepare.arguments import EmbedArguments, embed_arguments
from hf_vicreg.training.prepare.embedding_batches import Form, embedded_batches, form_of
from hf_vicreg.training.prepare.embedding_shards import ShardRows, digests_of, embedded_ids, first_changed, write_shard
from hf_vicreg.training.prepare.store import WRITING, remove_unfinished, write_whole
from hf_vicreg.training.run.places import BUILT_IN, EMBEDDING_FILE, data_setting
from hf_vicreg.training.run.run_folder import read_record, refuse_others

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

VERSION = 1
IMAGES_A_SHARD = 1024  # a multiple of the default batch: no batch of a whole shard is filled up
MAX_WORKERS = 16  # beside a GPU
PATIENCE_S = 30 * 24 * 3600  # the others may have a shard to make yet


@dataclass(frozen=True)
class Embedded:
    """What is in a finished folder.

    Attributes:
        folder: Readable by `datasets.load_dataset`.
        num_rows: Embedded images.
        num_unusable: Images without a row; `unusable.jsonl` names them.
    """

    folder: Path
    num_rows: int
    num_unusable: int


def embed(
    images: str | os.PathLike, model: str | os.PathLike, out: str | os.PathLike | None = None, **flags: Any
) -> "datasets.Dataset":
    """Return the embeddings of images: `id`, `path`, `height`, `width`, `embedding`, in the images' order.

    `id` is an image's place among all, `height` and `width` are those of its file in pixels, `embedding` is a list of
    fixed length. With labels there is a column `label`, with `patch_tokens=True` a column of that name, (rows,
    columns, hidden_size) in float16, with `inner_layers=True` one of the mean tokens of two inner layers. An image
    that cannot be read has no row and is named in `unusable.jsonl`.

    Args:
        images: A folder of image files, a parquet file, a local `datasets` folder, a Hub id, or `"digits"`.
        model: Folder or Hub id of any vision model of transformers.
        out: New or empty folder, or one that an earlier call with the same arguments left. Default: one below
            `hf_vicreg/features` in `HF_HOME`, named after model and images.
        flags: As of `hf-vicreg embed`: `split`, `dtype`, `patch_tokens`, `batch_size`, `num_workers`, `device`, ...

    Raises:
        InputError: Bad input, or a folder of embeddings of another model or other images; nothing has been written.
        RunStopped: It was asked to stop (SIGTERM, Ctrl-C); the same call goes on behind the complete shards.
    """
    import datasets

    place = None if out is None else Path(out)
    done = embed_images(os.fspath(images), os.fspath(model), place, embed_arguments(flags))
    return datasets.load_dataset(str(done.folder), split="train")


def embed_images(images: str, model: str, out: Path | None, arguments: EmbedArguments) -> Embedded:
    """Embed images into a folder, or what is missing there; every process must call. As `embed`."""
    check_device(arguments.device)
    accelerator = build_accelerator("no", device=arguments.device, patience_s=PATIENCE_S)
    encoder = load_vision_encoder(model, accelerator.device)
    source = source_for(encoder.processor, load_images(images, arguments, encoder.processor))
    form = form_of(encoder, arguments)
    record = _record(source, encoder, form, arguments)
    folder = run_on_main(lambda: out or _cache_folder(source, record), accelerator)
    missing = run_on_main(lambda: _open_folder(folder, source, record), accelerator)
    if missing:
        _make_shards(folder, source, encoder, form, missing, arguments, accelerator)
    accelerator.wait_for_everyone()
    return run_on_main(lambda: _finish(folder, source, record), accelerator)


def load_images(name: str, arguments: EmbedArguments, processor: Any = None) -> ImageSource:
    """Return the images that one word names; of a folder any that the image processor takes.

    Raises:
        InputError: Nothing to read there, an unknown split or column.
    """
    columns = (arguments.image_column_name, arguments.label_column_name)
    wanted = arguments.split or "train"
    if name == BUILT_IN:
        splits: dict[str, Any] = dict(zip(("train", "test"), load_sources(dataset_name=name), strict=True))
    elif os.path.isfile(name) and name.endswith(".parquet"):
        import datasets

        with blamed_on("IMAGES", f"expected a parquet file, got {name}"):
            splits = {"train": datasets.Dataset.from_parquet(name)}
        name = os.path.basename(name)
    else:
        where = data_setting(name, {})
        if "train_dir" in where and arguments.split is None:
            low = getattr(processor, "channel_low", None)
            if low is not None:
                return channel_folder(name, len(low), processor.pages)
            return load_sources(train_dir=name)[0]
        splits = load_splits(name, arguments.dataset_config_name)
    if wanted not in splits:
        raise InputError(f"`split`: expected one of {sorted(splits)} in {name}, got {wanted!r}.")
    found = splits[wanted]
    return found if isinstance(found, ImageSource) else dataset_source(name, found, *columns)


def _record(source: ImageSource, encoder: VisionEncoder, form: Form, arguments: EmbedArguments) -> dict[str, Any]:
    """Return what `embedding.json` says from the start."""
    record = {
        "version": VERSION,
        "model": encoder.describe(),
        "images": {
            "name": source.name,
            "split": arguments.split,
            "num_images": len(source),
            "fingerprint": source.fingerprint,
            "labels": hashlib.sha256(json.dumps([source.labels, source.label_names]).encode()).hexdigest()[:16],
        },
        "dtype": form.dtype,
        "size": form.size,
        "patch_tokens": form.tokens,
        "inner_layers": form.inner or None,
        "images_a_shard": IMAGES_A_SHARD,
    }
    return json.loads(json.dumps(record))


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a folder has to agree in; what model and images are called is not among it."""
    images = {key: value for key, value in record["images"].items() if key not in ("name", "split")}
    return record | {"model": same_model(record["model"]), "images": images}


def _cache_folder(source: ImageSource, record: dict[str, Any]) -> Path:
    """Return the folder of a call that names none, by model, flags and the bytes of all images."""
    digest = hashlib.sha256(json.dumps(_comparable(record), sort_keys=True).encode())
    digest.update(b"".join(digests_of(source, range(len(source)))))
    return Path(constants.HF_HOME) / "hf_vicreg" / "features" / f"embed-{digest.hexdigest()[:32]}"


def _shard_path(folder: Path, shard: int, num_images: int) -> Path:
    return folder / "data" / f"train-{shard:05d}-of-{-(-num_images // IMAGES_A_SHARD):05d}.parquet"


def _indices(shard: int, num_images: int) -> range:
    return range(shard * IMAGES_A_SHARD, min((shard + 1) * IMAGES_A_SHARD, num_images))


def _open_folder(folder: Path, source: ImageSource, record: dict[str, Any]) -> list[int]:
    """Return the shards that are not there yet, in a folder that is new or of a call like this one.

    Raises:
        InputError: It holds something else, or embeddings of another model or other images; nothing is written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`OUT`: expected a folder, got {folder}, which is a file; choose another place.")
    shards = range(-(-len(source) // IMAGES_A_SHARD))
    if not folder.is_dir() or all(path.name.startswith(WRITING) for path in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        write_whole(folder / EMBEDDING_FILE, _encoded(record))
        (folder / "data").mkdir()
        return list(shards)
    found, remedy = read_record("OUT", folder / EMBEDDING_FILE), "choose another folder"
    refuse_others("OUT", folder, found, _comparable(record), remedy)
    complete = [shard for shard in shards if _shard_path(folder, shard, len(source)).exists()]
    if complete:
        logger.info("comparing the images of %d complete shard(s) with those embedded", len(complete))
    for shard in complete:
        changed = first_changed(source, _indices(shard, len(source)), _shard_path(folder, shard, len(source)))
        if changed is not None:
            raise InputError(
                f"`OUT`: expected embeddings of these images in {folder}, found that of another one in place of "
                f"{source.describe(changed)}, which was changed since; {remedy}."
            )
    remove_unfinished(folder)
    (folder / "data").mkdir(exist_ok=True)
    remove_unfinished(folder / "data")
    if len(complete) == len(shards) and "num_rows" in found:
        logger.info("%s is finished: nothing to do", folder)
    elif complete:
        logger.info("%d of %d shards are there already", len(complete), len(shards))
    return [shard for shard in shards if shard not in set(complete)]


def _make_shards(
    folder: Path,
    source: ImageSource,
    encoder: VisionEncoder,
    form: Form,
    missing: list[int],
    arguments: EmbedArguments,
    accelerator: Accelerator,
) -> None:
    """Make this process's part of the missing shards.

    Raises:
        InputError: Embeddings that cannot be stored.
        RunStopped: It was asked to stop.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    own = missing[rank::processes]
    ranges = [_indices(shard, len(source)) for shard in own]
    size = arguments.batch_size
    batches = [one[start : start + size] for one in ranges for start in range(0, len(one), size)]
    total = sum(len(_indices(shard, len(source))) for shard in missing)
    own_total, own_done = sum(map(len, ranges)), 0
    progress = Progress(len(source), len(source) - total, shown=accelerator.is_main_process, unit="image")
    embedded = embedded_batches(
        source, encoder, form, batches, batch_size=size, num_workers=_num_workers(arguments, accelerator.device.type)
    )
    try:
        with StopRequest(folder, None) as stop:
            for shard, indices in zip(own, ranges, strict=True):
                rows = ShardRows(source, form, len(indices))
                while len(rows.digests) < len(indices):
                    rows.add(next(embedded))
                    reason = stop.reason()
                    if reason:
                        stop.fulfilled()
                        message = f"stopped by {reason}; the same command goes on behind the complete shards"
                        logger.warning(message)
                        raise RunStopped(message)
                    # the others are about as far
                    done = own_done + len(rows.digests)
                    progress.update(len(source) - total + done * total // own_total)
                own_done += len(indices)
                write_shard(_shard_path(folder, shard, len(source)), rows)
    except InputError as error:
        if not accelerator.is_main_process:
            logger.error("process %d: %s", rank, error)  # the others do not see its images
        raise
    finally:
        embedded.close()
        progress.close()


def _num_workers(arguments: EmbedArguments, device: str) -> int:
    if arguments.num_workers is not None:
        return arguments.num_workers
    cores = torch.get_num_threads()  # this process's share of the machine's
    if device != "cpu":
        return min(cores, MAX_WORKERS)
    return cores if cores > 1 else 0


def _finish(folder: Path, source: ImageSource, record: dict[str, Any]) -> Embedded:
    """Name the images without a row, and say that the folder is finished.

    Raises:
        InputError: No image could be read.
    """
    shards = range(-(-len(source) // IMAGES_A_SHARD))
    ids = embedded_ids([_shard_path(folder, shard, len(source)) for shard in shards])
    if not ids:
        raise InputError(f"`IMAGES`: expected readable images in {source.name}, {none_readable(source)}.")
    done = Embedded(folder, len(ids), len(source) - len(ids))
    finished = record | {"num_rows": done.num_rows, "num_unusable": done.num_unusable}
    if read_record("OUT", folder / EMBEDDING_FILE).get("num_rows") != done.num_rows:
        write_unusable(folder, source, set(range(len(source))) - ids, "cannot be read and have no row")
        write_whole(folder / EMBEDDING_FILE, _encoded(finished))
    return done


def _encoded(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()
