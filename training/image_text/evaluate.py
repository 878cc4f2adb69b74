"""`hf-vicreg evaluate image-text`: recall between images and captions, and zero-shot accuracy."""

import time
from pathlib import Path
from typing import Any

import torch

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import ImageTextArguments
from hf_vicreg.training.evaluation.encoder import public_name, source_for, weights_digest
from hf_vicreg.training.evaluation.evaluate import share_right
from hf_vicreg.training.evaluation.features import encoded_batches
from hf_vicreg.training.evaluation.online_probe import small_pixels
from hf_vicreg.training.evaluation.results import FILE, add_evaluation, evaluation_record, results_folder
from hf_vicreg.training.image_text.dual import Dual, load_dual
from hf_vicreg.training.image_text.retrieval import chance, numbered, prompts, retrieval_figures, zero_shot_predictions
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.sources import dataset_source, load_splits
from hf_vicreg.training.texts.captions import fingerprint_of, read_captions


def evaluate_image_text(model: str, arguments: ImageTextArguments) -> dict[str, Any]:
    """Measure a model of images and texts, print and store it; returns the entry of `results.json`.

    Args:
        model: Folder or Hub id.
        arguments: The flags.

    Raises:
        InputError: Bad input.
    """
    started = time.perf_counter()
    if not arguments.dataset_name:
        raise InputError("`dataset_name`: expected images with captions, got none; add --dataset_name NAME.")
    if not (arguments.caption_column or arguments.label_column_name or arguments.second_image_column_name):
        raise InputError(
            "`caption_column`, `label_column_name`: expected one of the two, got none; name what there is to measure."
        )
    split, rows, texts = _rows(arguments)
    source = dataset_source(arguments.dataset_name, rows, arguments.image_column_name, arguments.label_column_name)
    names = _class_names(arguments, source)
    folder, dual = results_folder(model, arguments.output_dir), load_dual(model)
    indices, images = dual.images(source)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"images": len(indices)}
    if texts is not None:
        kept = [texts[index] for index in indices]
        owners = torch.tensor([place for place, found in enumerate(kept) for _ in found])
        captions = [one for found in kept for one in found]
        relations = owners, numbered(captions)
        metrics |= retrieval_figures(images, dual.texts(captions), *relations)
        details |= {"captions": len(owners), "chance": chance(len(indices), *relations)}
    if names is not None:
        assert source.labels is not None
        labels = torch.tensor([source.labels[index] for index in indices])
        classes = dual.texts(prompts(arguments.templates, names))
        metrics["zero_shot_accuracy"] = share_right(zero_shot_predictions(images, classes, len(names)), labels)
    if arguments.second_image_column_name is not None:
        metrics |= _pictures(dual, rows, source, arguments)
    record = evaluation_record(
        "image_text",
        {
            "name": public_name(model),
            "model_type": dual.model.config.model_type,
            "parameters": sum(one.numel() for one in dual.model.parameters()),
            "weights": weights_digest(dual.model),
        },
        {
            "dataset": public_name(arguments.dataset_name),
            "config": arguments.dataset_config_name,
            "test_split": split,
            "image_column": arguments.image_column_name,
            "num_test": len(source),
            "test_fingerprint": f"{source.fingerprint}/{fingerprint_of(texts or [])}",
        },
        {
            name: getattr(arguments, name)
            for name in ("caption_column", "second_image_column_name", "label_column_name", "class_names", "templates")
        },
        metrics,
        details=details,
        pictures=[],
        seconds=time.perf_counter() - started,
    )
    add_evaluation(folder, record)
    _print(model, source, metrics, details, folder)
    return record


def _rows(arguments: ImageTextArguments) -> tuple[str, Any, list[list[str]] | None]:
    """Return the name of the split, its rows, and their captions if they are asked for."""
    name = arguments.dataset_name
    splits = load_splits(name, arguments.dataset_config_name)
    split = arguments.test_split or next((one for one in ("test", "validation") if one in splits), None)
    if split is None or split not in splits:
        raise InputError(
            f"`test_split`: expected one of {sorted(splits)} in {name}, got {split or 'none'}; name it with "
            "--test_split."
        )
    rows, texts = splits[split], None
    if arguments.max_test_samples is not None:
        rows = rows.select(range(min(max(1, arguments.max_test_samples), len(rows))))
    if arguments.caption_column:
        rows, texts = read_captions(name, rows, arguments.caption_column, split)
    return split, rows, texts


def _class_names(arguments: ImageTextArguments, source: ImageSource) -> list[str] | None:
    """Return the names of the classes, None where classes are not asked for."""
    if arguments.label_column_name is None:
        return None
    names = arguments.class_names or source.label_names
    least = max(source.labels or [0]) + 1
    if names is None or len(names) < least:
        raise InputError(
            f"`class_names`: expected a name for each of {least} classes, got {len(names or [])}; add --class_names."
        )
    if any("{}" not in one for one in arguments.templates):
        raise InputError("`templates`: expected `{}` in each, where the name goes.")
    return names


def _pictures(dual: Dual, rows: Any, source: ImageSource, arguments: ImageTextArguments) -> dict[str, float]:
    """Return recall at 1 of the first pictures to the second, of the model and of raw pixels."""
    others = dataset_source(arguments.dataset_name, rows, arguments.second_image_column_name, None, said=True)
    figures = {}
    for name, encode in (("image_to_image", dual.pixels), ("raw_pixels", small_pixels)):
        both: list[torch.Tensor] = []
        for one in (source, others):
            read = source_for(dual.processor, one)
            parts = [(indices, features) for _, indices, features in encoded_batches(read, dual.processor, encode)]
            if sum(len(indices) for indices, _ in parts) < len(one):
                raise InputError("`second_image_column_name`: expected readable images, some are corrupt; check them.")
            both.append(torch.cat([features for _, features in parts]))
        found = retrieval_figures(both[0], both[1], torch.arange(len(source)))
        figures[f"{name}_recall_1"] = found["image_to_text_recall_1"]
    return figures


def _print(model: str, source: ImageSource, metrics: dict[str, float], details: dict[str, Any], folder: Path) -> None:
    captions = f", {details['captions']} captions" if "captions" in details else ""
    print(f"\n{one_line(public_name(model))} on {details['images']} images of {one_line(source.name)}{captions}\n")
    by_chance = details.get("chance", {})
    for name, value in metrics.items():
        said = f"  (by chance {by_chance[name]:.3f})" if name in by_chance else ""
        print(f"  {name.replace('_', ' '):32}{value:8.3f}{said}")
    print(f"\n{folder / FILE}")
