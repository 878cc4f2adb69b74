"""What `results.json`, `recipe.yaml`, `config.json` and `log.jsonl` may hold: the type and the range of every field.

A folder may come from anybody, so its files are data to be checked before a value reaches a card, a command, a picture
or a screen. A check takes a value and the field's name and returns what is kept of it, or raises `FileError`. None
passes every check: it says that something was not measured. So does a number that is not finite.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from hf_vicreg.model_cards.escaping import printable

Check = Callable[[Any, str], Any]

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}", re.ASCII)
MAX_BYTES = {"results.json": 2**26, "recipe.yaml": 2**20}  # of a file; of others 16 MiB
MAX_DEPTH, MAX_VALUES, MAX_TEXT = 16, 1_000_000, 4000
MAX_NUMBER, MAX_COUNT, MAX_SIZE, MAX_LAYERS = 1e30, 2**53, 2**20, 10_000
# settings by which transformers fetches code of others, and those that name classes to it: we write our own
FOREIGN_CODE = re.compile(r"_?(attn|experts)_implementation(_internal)?")
NAMES_OF_CODE = re.compile(r"auto_map|custom_pipelines|_.*")


class FileError(ValueError):
    """A file of a folder holds something else than it may, told in one line; the value itself is never shown."""


def number(low: float = -MAX_NUMBER, high: float = MAX_NUMBER, *, whole: bool = False) -> Check:
    """Return a check for a number of a range; one that is not finite counts as not measured."""
    kind = "a whole number" if whole else "a number"

    def check(value: Any, field: str) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not low <= value <= high or (whole and value != int(value)):
            _refuse(field, f"{kind} from {low:g} to {high:g}", value)
        return int(value) if whole else value

    return _or_none(check)


def text(longest: int = 300) -> Check:
    """Return a check for text, which is kept on one line with nothing in it that steers a terminal."""

    def check(value: Any, field: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            _refuse(field, f"text of at most {longest} characters", value)
        return printable(value).replace("\n", " ").replace("\t", " ")

    return _or_none(check)


def name(pattern: str | re.Pattern, words: str) -> Check:
    """Return a check for text that matches a pattern as a whole."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: Any, field: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            _refuse(field, words, value)
        return value

    return _or_none(check)


def flag(value: Any, field: str) -> Any:
    """Check for true or false."""
    if value is not None and not isinstance(value, bool):
        _refuse(field, "true or false", value)
    return value


def either(*checks: Check) -> Check:
    """Return a check that one of several has to pass."""

    def check(value: Any, field: str) -> Any:
        for one in checks[:-1]:
            try:
                return one(value, field)
            except FileError:
                continue
        return checks[-1](value, field)

    return check


def list_of(item: Check, longest: int = 100_000) -> Check:
    """Return a check for a list."""

    def check(value: Any, field: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > longest:
            _refuse(field, f"a list of at most {longest}", value)
        return [item(one, f"{field}[{index}]") for index, one in enumerate(value)]

    return _or_none(check)


def mapping(item: Check, key: Check) -> Check:
    """Return a check for a mapping whose keys are not known; what was not measured is left out."""

    def check(value: Any, field: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > 100_000:
            _refuse(field, "a mapping", value)
        found = {key(str(one), f"a name in {field}"): item(value[one], field) for one in value}
        return {one: kept for one, kept in found.items() if kept is not None or value.get(one) is None}

    return _or_none(check)


def record(fields: dict[str, Check], rest: Check | None = None) -> Check:
    """Return a check for a mapping of known fields; others pass `rest`, and are left out without one."""

    def check(value: Any, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            _refuse(field, "a mapping", value)
        prefix = f"{field}." if field else ""
        found = {key: fields[key](one, f"{prefix}{key}") for key, one in value.items() if key in fields}
        if rest is not None:
            found |= rest({key: one for key, one in value.items() if key not in fields}, field)
        order = {key: place for place, key in enumerate(value)}
        return {key: found[key] for key in sorted(found, key=lambda key: order.get(key, len(order)))}

    return _or_none(check)


def plain(value: Any, field: str) -> Any:
    """Check for what JSON can hold: finite numbers, text, lists and mappings, of bounded depth and size."""
    return _plain(value, field, MAX_DEPTH, iter(range(MAX_VALUES)))


def _plain(value: Any, field: str, depth: int, left: Iterator[int]) -> Any:
    if next(left, None) is None or depth < 0:
        _refuse(field, f"at most {MAX_VALUES:,} values, {MAX_DEPTH} deep", value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return _ANY_NUMBER(value, field)
    if isinstance(value, str):
        return _ANY_TEXT(value, field)
    if isinstance(value, list):
        return [_plain(one, field, depth - 1, left) for one in value]
    if isinstance(value, dict):
        return {_key(key, field): _plain(one, field, depth - 1, left) for key, one in value.items()}
    return _refuse(field, "a number, text, a list or a mapping", value)


def _key(key: Any, field: str) -> str:
    return _KEY(key if isinstance(key, str) else str(key), f"a name in {field}" if field else "a name")


def _or_none(check: Check) -> Check:
    return lambda value, field: None if value is None else check(value, field)


def _refuse(field: str, expected: str, value: Any) -> Any:
    where = f" in `{field}`" if field else ""
    raise FileError(f"expected {expected}{where}, got {_described(value)}; correct it or take it out.")


def _described(value: Any) -> str:
    """Return what a value is, without what it says: it may be a secret."""
    if isinstance(value, str):
        return f"text of {len(value):,} characters"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value):,}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if abs(value) < MAX_NUMBER else "a larger one"
    return type(value).__name__


_ANY_NUMBER, _ANY_TEXT, _KEY = number(), text(MAX_TEXT), text(200)
COUNT, SIZE, SECONDS, LINE = number(0, MAX_COUNT, whole=True), number(1, MAX_SIZE, whole=True), number(0, 1e12), text()
SIZES, LAYERS = either(list_of(SIZE, 64), SIZE), number(0, MAX_LAYERS, whole=True)
IDENTIFIER = name(r"[A-Za-z_]\w{0,127}", "a name of letters, digits and _")
OBJECTIVE = name(r"[A-Za-z_]\w{0,31}(\+[A-Za-z_]\w{0,31}){0,9}", "names of letters, digits and _, with + between")
MODEL_TYPE = name(r"[A-Za-z0-9][\w.-]{0,63}", "a model type of letters, digits, _ and -")
FIGURES = mapping(number(), name(r"[\w.%-]{1,128}", "a name of letters, digits, _, ., % and -"))
PLAIN = record({}, plain)

EVALUATION = record(
    {
        "task": name(r"[a-z_]{1,64}", "a task, as `linear`"),
        "model": record({"name": LINE, "model_type": MODEL_TYPE, "parameters": COUNT}, plain),
        "data": record(
            {
                "dataset": LINE,
                "config": LINE,
                "train_split": LINE,
                "test_split": LINE,
                "num_train": COUNT,
                "num_test": COUNT,
                "num_classes": COUNT,
                "test_images_in_train": COUNT,
                "class_names": list_of(text(1000)),
                "labels_digest": name(r"[0-9a-f]{16}", "16 hexadecimal digits"),
            },
            plain,
        ),
        "settings": mapping(plain, IDENTIFIER),
        "metrics": FIGURES,
        "details": record(
            {
                "pretrained_model": LINE,
                "num_labelled": COUNT,
                "num_unlabelled": COUNT,
                "steps": COUNT,
                "training_seconds": SECONDS,
            },
            plain,
        ),
        "pictures": list_of(name(r"[A-Za-z0-9][\w.-]{0,127}\.png", "the name of a PNG file"), 100),
        "environment": mapping(LINE, name(r"[\w.-]{1,64}", "a name of letters, digits, _, . and -")),
        "date": text(40),
        "seconds": SECONDS,
    }
)
RESULTS = record(
    {
        "dataset": LINE,
        "hub_dataset": name(
            r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", "the id of a dataset, as OWNER/NAME"
        ),
        "num_images": COUNT,
        "unusable_images": COUNT,
        "steps": COUNT,
        "planned_steps": COUNT,
        "skipped_steps": COUNT,
        "training_seconds": SECONDS,
        "flops_per_step": number(0, whole=True),
        "hardware": LINE,
        "encoder_parameters": COUNT,
        "features": SIZE,
        "attention_density": number(0, 1),
        "knn_neighbours": COUNT,
        "knn_train_samples": COUNT,
        "knn_test_samples": COUNT,
        "knn_accuracy": FIGURES,
        "linear_accuracy": FIGURES,
        "image_text": FIGURES,
        "health": FIGURES,
        "objective": OBJECTIVE,
        "method": LINE,
        "loss_parts": list_of(IDENTIFIER, 50),
        "verdicts": list_of(
            record(
                {"name": LINE, "finding": text(1000), "remedy": text(1000), "step": COUNT, "present": flag},
            ),
            1000,
        ),
        "evaluations": list_of(EVALUATION, 10_000),
    }
)
CONFIG = record(
    {
        "model_type": MODEL_TYPE,
        "architectures": list_of(IDENTIFIER, 100),
        "hidden_size": SIZE,
        "intermediate_size": SIZES,
        "image_size": SIZES,
        "patch_size": SIZES,
        "num_channels": SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": SIZES,
        "id2label": mapping(text(1000), name(r"-?\d{1,9}", "a whole number")),
    },
    plain,
)
RECIPE = record(
    {
        "batch_size": SIZE,
        "statistics_batch_size": COUNT,
        "model": record({"model_type": MODEL_TYPE}, plain),
        "second_model": record({"model_type": MODEL_TYPE}, plain),
        "objective": OBJECTIVE,
        "vicreg": record({"gamma": number(1e-6, 1e6)}, plain),
    },
    plain,
)


def check_results(value: Any) -> dict[str, Any]:
    """Return what is known of the content of a `results.json`."""
    return RESULTS(value, "") or {}


def check_recipe(value: Any) -> dict[str, Any]:
    """Return the content of a `recipe.yaml`, checked."""
    return RECIPE(value, "") or {}


def check_config(value: Any) -> dict[str, Any]:
    """Return the content of a `config.json`, checked and without anything that names code."""
    return _without_code(CONFIG(value, "") or {})


def check_plain(value: Any) -> dict[str, Any]:
    """Return the content of a file that is a mapping of any plain values, checked."""
    return PLAIN(value, "") or {}


def check_log_record(value: Any) -> dict[str, Any] | None:
    """Return the figures of a line of `log.jsonl`, without anything that is no number; None if it has no step."""
    if not isinstance(value, dict):
        return None
    kept = {
        str(key): one
        for key, one in value.items()
        if isinstance(one, int | float) and not isinstance(one, bool) and not MAX_NUMBER < abs(one) < math.inf
    }
    step = kept.get("step")
    return kept if isinstance(step, int) and 0 <= step <= MAX_COUNT else None


def read_checked(path: Path, check: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file, checked.

    Args:
        path: The file; YAML by its ending.
        check: `check_results`, `check_recipe` or `check_config`.

    Raises:
        FileError: Not such a file, larger than it may be, or a value that is not what it has to be.
    """
    limit = MAX_BYTES.get(path.name, 2**24)
    kind = "a mapping of settings" if path.suffix == ".yaml" else "a JSON object"
    if not path.is_file() or path.stat().st_size > limit:
        raise FileError(f"`{path.name}`: expected a file of at most {limit:,} bytes in {path.parent}, got another.")
    try:
        content = path.read_text(encoding="utf-8")
        value = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FileError(f"`{path.name}`: expected {kind} in {path.parent}, cannot be read.")
    try:
        return check(value)
    except FileError as error:
        raise FileError(f"`{path.name}`: {error}") from None


def _without_code(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_code(one) for one in value]
    if not isinstance(value, dict):
        return value
    for key, one in value.items():
        if FOREIGN_CODE.fullmatch(key) and "/" in str(one):
            raise FileError(f"expected no code of others, `{key}` names some; take it out.")
    return {key: _without_code(one) for key, one in value.items() if not NAMES_OF_CODE.fullmatch(key)}
