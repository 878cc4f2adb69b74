"""What leaves the machine: a copy of a run's folder, by an allow-list, in a folder of its own.

Weights, configurations and results are read from the run; code, card and pictures are made anew. Nothing else is
copied, so checkpoints, optimiser state, logs, pickles and whatever else lies there stay where they are. The run's
folder may be somebody else's: its files are checked when they are read, and none of its code comes along.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from hf_vicreg.model_cards.card import OF_THE_OWNER, CardFacts, model_card, with_folders_named
from hf_vicreg.model_cards.escaping import without_paths
from hf_vicreg.model_cards.schema import HUB_ID, check_config, check_plain, check_recipe, check_results, read_checked
from hf_vicreg.publishing.custom_code import AUTO_MAPS, write_custom_code
from hf_vicreg.publishing.pictures import draw_pictures
from hf_vicreg.publishing.secret_scan import refuse_secrets
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.run.run_folder import file_inside

WEIGHTS, INDEX, PROCESSOR = "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MAX_TOKENIZER = 2**26  # bytes
MAX_PIXELS = 50_000_000  # of a picture that comes along
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SECOND, PRETRAINING, ADAPTER, NEIGHBOURS = "second_encoder", "pretraining", "adapter", "neighbours.png"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONVERSION = "conversion.json"  # of `hf-vicreg convert`; it stays here
# names of a repository that publishing writes and takes away again when a run has them no more
GENERATED = re.compile(
    rf"(({SECOND}|{PRETRAINING})/)?(config\.json|preprocessor_config\.json|model(-\d{{5}}-of-\d{{5}})?\.safetensors"
    r"|model\.safetensors\.index\.json)|results\.json|recipe\.yaml|training_curves\.png|attention_pattern\.png"
    rf"|{re.escape(NEIGHBOURS)}|tokenizer(_config)?\.json|{ADAPTER}/(adapter_config\.json|adapter_model\.safetensors)"
)


class StagedFiles:
    """What a staged model and a staged Space are both asked for; `folder` and `names` are theirs."""

    folder: Path
    names: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each file in bytes."""
        return {name: (self.folder / name).stat().st_size for name in self.names}

    @property
    def card(self) -> str:
        """The card as it will be published."""
        return (self.folder / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Staged(StagedFiles):
    """A folder ready to be published.

    Attributes:
        folder: Where the files lie.
        names: Their names, relative, with `/` between folder and file, in order.
        facts: What its card was made from.
        left_out: What lies in the run's folder and does not leave, by name.
    """

    folder: Path
    names: list[str]
    facts: CardFacts
    left_out: list[str]

    @property
    def generated(self) -> re.Pattern[str]:
        """Names of a repository that publishing may take away."""
        return GENERATED


def stage(
    run: Path, into: Path, *, repo: str, include_pretraining: bool = False, license: str | None = None
) -> Staged:
    """Copy what may be published of a run, or of a fine-tuned folder, into an empty folder.

    Args:
        run: The folder to publish; only read.
        into: An empty folder.
        repo: The repository's id, for the card.
        include_pretraining: Take `pretraining/` along, the encoder with its expander.
        license: Of the weights, for the card.

    Raises:
        InputError: Not such a folder, an unfinished run, weights that are not safetensors, or something secret in it.
        FileError: A value in one of its files that is not what it has to be.
    """
    config = _read_config(run)
    results = {}
    if (run / "results.json").exists():
        results = without_paths(read_checked(file_inside(run, "results.json"), check_results))
    recipe = with_folders_named(_read_recipe(run))
    parts = [""]
    if (run / SECOND / "config.json").exists():
        parts.append(SECOND)
    if include_pretraining:
        if not (run / PRETRAINING / "config.json").exists():
            raise InputError(f"`include_pretraining`: expected {PRETRAINING}/config.json in {run}, found none.")
        parts.append(PRETRAINING)
    for part in parts:
        (into / part).mkdir(exist_ok=True)
        _copy_model(run, part, into)
    has_adapter = (run / ADAPTER / ADAPTER_CONFIG).exists()
    if has_adapter:
        (into / ADAPTER).mkdir()
        adapter = read_checked(file_inside(run, ADAPTER, ADAPTER_CONFIG), check_config)
        _write_json(into / ADAPTER / ADAPTER_CONFIG, without_paths(adapter))
        _copy_weights(run, ADAPTER, ADAPTER_WEIGHTS, into)
    if config.get("model_type") == "vicreg_dual_encoder":
        _copy_tokenizer(run, into)
    if results:
        (into / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if recipe:
        public = {key: value for key, value in recipe.items() if key not in OF_THE_OWNER}
        (into / "recipe.yaml").write_text(yaml.safe_dump(public, sort_keys=False))
    refuse_secrets(into, _names(into))  # before a message about a value could show one
    write_custom_code(into, [into / part / "config.json" for part in parts])
    results, others = _of_these_weights(into, results)
    log = _read_log(run)
    encoder = _encoder_config(into)
    pictures = draw_pictures(into, getattr(encoder, "vision_config", encoder), log, results)
    if (run / NEIGHBOURS).exists() and not _drawn_for(others, results):
        _copy_picture(file_inside(run, NEIGHBOURS), into / NEIGHBOURS)
        pictures.append(NEIGHBOURS)
    facts = CardFacts(
        name=repo.partition("/")[2],
        config=config,
        results=results,
        recipe=recipe,
        log=log,
        repo_id=repo,
        pictures=tuple(pictures),
        has_second_encoder=SECOND in parts,
        has_pretraining=PRETRAINING in parts,
        has_adapter=has_adapter,
        license=license,
        converted_from=None if recipe else _converted_from(run),
    )
    (into / "README.md").write_text(model_card(facts), encoding="utf-8")
    names = _names(into)
    refuse_secrets(into, names)
    left_out = sorted(
        path.name + "/" * path.is_dir()
        for path in run.iterdir()
        if path.name not in names and not any(name.startswith(f"{path.name}/") for name in names)
    )
    if others:
        told = ", ".join(f"{one.get('task')} of {(one.get('model') or {}).get('name')}" for one in others)
        left_out.append(f"of results.json {told}: measured with other weights than these, to be measured again")
    return Staged(into, names, facts, left_out)


def _of_these_weights(folder: Path, results: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take evaluations of other weights out of the results of a staged folder; the results, and what was taken out."""
    from hf_vicreg.training.evaluation.results import split_by_weights

    kept, others = split_by_weights(folder, results)
    if others:
        (folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    return kept, others


def _drawn_for(others: list[dict[str, Any]], results: dict[str, Any]) -> bool:
    """Whether a picture of neighbours is of other weights: each evaluation that draws one overwrites it."""
    drawing = [one for one in (results.get("evaluations") or []) + others if NEIGHBOURS in (one.get("pictures") or [])]
    return bool(drawing) and max(drawing, key=lambda one: str(one.get("date"))) in others


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _copy_picture(source: Path, target: Path) -> None:
    """Write the pixels of a PNG file into another, without comments, profiles or whatever else it holds."""
    try:
        # of its format alone: others have readers that start programs
        with Image.open(source, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError("too large")
            pixels = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise InputError(
            f"`{source.name}`: expected a PNG file of at most {MAX_PIXELS:,} pixels in {source.parent}, got another."
        ) from None
    Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(target)


def _read_config(run: Path) -> dict[str, Any]:
    """Return the model's configuration, or say why this is no folder to publish."""
    if not run.is_dir():
        raise InputError(f"`RUN`: expected the folder of a run, got {str(run)!r}, which is none.")
    is_run = (run / "recipe.yaml").exists()
    missing = [name for name in ("config.json", PROCESSOR) if not (run / name).exists()]
    if is_run and (missing or not (run / "results.json").exists()):
        raise InputError(
            f"`RUN`: expected a finished run, {run} has no {(missing or ['results.json'])[0]} yet; finish it with "
            "--resume_from_checkpoint latest."
        )
    if missing:
        raise InputError(f"`RUN`: expected the folder of a run or a fine-tuned model, {run} has no {missing[0]}.")
    config = read_checked(file_inside(run, "config.json"), check_config)
    model_type = config.get("model_type")
    if model_type in ("vicreg", "bigbird_vit_mae"):
        raise InputError(f"`RUN`: expected the run's folder, {run} is its wrapper; give the folder above it.")
    if not is_run and model_type not in AUTO_MAPS:
        raise InputError(f"`RUN`: expected a run or a model of type 'bigbird_vit', {run} holds a {model_type!r}.")
    return config


def _copy_model(run: Path, part: str, into: Path) -> None:
    """Copy configuration, processor and weights of the folder `part` of a run, checked."""
    for name in ("config.json", PROCESSOR):
        if name == "config.json" or (run / part / name).exists():
            _write_json(into / part / name, read_checked(file_inside(run, part, name), check_config))
    names = [WEIGHTS]
    if (run / part / INDEX).exists():
        index = read_checked(file_inside(run, part, INDEX), check_plain)
        shards = index.get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        foreign = [name for name in names if not SHARD.fullmatch(name)]
        if foreign or not names:
            raise InputError(
                f"`{INDEX}`: expected names of shards in {run / part}, got {'others' if foreign else 'none'}."
            )
        _write_json(into / part / INDEX, index)
    for name in names:
        _copy_weights(run, part, name, into)


def _copy_weights(run: Path, part: str, name: str, into: Path) -> None:
    """Copy a file of safetensors of the folder `part` of a run, once its header holds."""
    if not (run / part / name).exists():
        raise InputError(f"`RUN`: expected {part}{'/' * bool(part)}{name} in {run}, found none; safetensors only.")
    source = file_inside(run, part, name)
    try:
        with safe_open(source, framework="pt") as weights:  # its header is checked against its length
            weights.keys()
    except SafetensorError as error:
        raise InputError(f"`{name}`: expected safetensors in {run / part}, cannot be read: {error}.") from None
    shutil.copyfile(source, into / part / name)


def _copy_tokenizer(run: Path, into: Path) -> None:
    """Copy the tokenizer of a model of images and texts, checked."""
    table, settings = TOKENIZER
    for name in TOKENIZER:
        if not (run / name).exists():
            raise InputError(
                f"`RUN`: expected {name} in {run}, found none; only tokenizers in that form are published."
            )
    source = file_inside(run, table)
    try:
        if source.stat().st_size > MAX_TOKENIZER:
            raise ValueError(f"it is larger than {MAX_TOKENIZER:,} bytes")
        Tokenizer.from_file(str(source))  # data, read by a parser of its own
    except Exception as error:  # the parser raises nothing more special
        raise InputError(f"`{table}`: expected a tokenizer in {run}, cannot be read: {error}.") from None
    shutil.copyfile(source, into / table)
    _write_json(into / settings, read_checked(file_inside(run, settings), check_config))


def _read_recipe(run: Path) -> dict[str, Any]:
    """Return what of a run's recipe is known to be one: a file may hold anything."""
    path = run / "recipe.yaml"
    if not path.exists():
        return {}
    from dataclasses import fields

    from hf_vicreg.training.run.arguments import SECTIONS, PretrainArguments

    recipe = read_checked(file_inside(run, "recipe.yaml"), check_recipe)
    known = {one.name for one in fields(PretrainArguments)} | set(SECTIONS)
    return {key: value for key, value in recipe.items() if key in known and value is not None}


def _converted_from(run: Path) -> str | None:
    """Return the model that `hf-vicreg convert` made a folder from: its Hub id, of a folder the name alone."""
    if not (run / CONVERSION).exists():
        return None
    source = read_checked(file_inside(run, CONVERSION), check_plain).get("source")
    if not isinstance(source, str):
        return None
    return source if HUB_ID.fullmatch(source) and not Path(source).exists() else PurePath(source).name


def _read_log(run: Path) -> list[dict[str, Any]]:
    from hf_vicreg.training.monitor.run_log import read_log

    with blamed_on("log.jsonl", f"expected lines of JSON in {run}"):
        return read_log(file_inside(run, "log.jsonl"))


def _encoder_config(folder: Path) -> Any:
    from transformers import AutoConfig

    with blamed_on("config.json", "expected the configuration of a model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
