"""The model card of a run or a fine-tuned folder: what was measured, and nothing that was not.

Every figure comes from `results.json` or `log.jsonl`; one that is not there reads "not measured". What is generated
lies between two comment lines a section, which is what `merging.py` goes by. The files may be somebody else's: their
values are checked by `schema.py` before they become facts, and escaped where they are written.
"""

import re
import shlex
import statistics
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from hf_vicreg.model_cards.dual import DUAL_CODE, DUAL_IMPORTS, DUAL_LOCAL_CODE, DUAL_TYPE, retrieval_table
from hf_vicreg.model_cards.escaping import code, code_block, is_path, one_line, prose, python_string, without_paths
from hf_vicreg.model_cards.merging import BEGIN, END, SECTIONS
from hf_vicreg.model_cards.multitask import HEADS_NOTE, about_tasks, multitask_record, tasks_table
from hf_vicreg.model_cards.results import (
    MISSING,
    compute,
    count,
    dense_tables,
    evaluation_results,
    evaluations_table,
    figure,
    knn_table,
)
from hf_vicreg.model_cards.schema import (
    HUB_ID,
    LICENSE,
    FileError,
    check_config,
    check_log_record,
    check_recipe,
    check_results,
)

VICREG_PARTS = ("invariance", "variance", "covariance")  # of a run of before other objectives
# where a run lay and went to: its owner's business; the card names the data itself
OF_THE_OWNER = {
    "output_dir",
    "train_dir",
    "dataset_name",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
}
# models that a run takes something from, and what stands in the card's command for a folder of its author's
OF_OTHERS = {
    "model_name_or_path": "FOLDER_OF_AN_ENCODER",
    "teacher": "FOLDER_OF_A_TEACHER",
    "teacher_features": "FOLDER_OF_FEATURES",
    "text_model": "FOLDER_OF_A_TEXT_MODEL",
}
# code of the card, with nothing in it that is not ours: `name` and `images` are given to it
DUAL_PARTS = ("vision_config", "text_config")  # of a model of images and texts
LOCAL_SNIPPET = """\
import hf_vicreg; from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained({name}), AutoModel.from_pretrained({name})
features = model(**processor(images, return_tensors="pt")).pooler_output  # (images, {features})"""
PACKAGED_SNIPPET = """\
import hf_vicreg
from transformers import AutoImageProcessor

model = hf_vicreg.load({name})
processor = AutoImageProcessor.from_pretrained(model.name_or_path)
features = model(**processor(images, return_tensors="pt")).pooler_output  # (images, {features})"""
HUB_IMPORTS = "from transformers import AutoImageProcessor, AutoModel"
HUB_CODE = """\
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True)
features = model(**processor(images, return_tensors="pt")).pooler_output"""
CLASSIFIER_IMPORTS = "from transformers import pipeline"
CLASSIFIER_CODE = """\
classify = pipeline("image-classification", model=name, trust_remote_code=True)
labels = classify(images)  # for each image its likeliest labels and their scores"""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        name: Heading of the card, and the model's name in its metadata.
        config: What the model's `config.json` holds.
        results: What `results.json` holds; may be empty.
        recipe: The run's resolved configuration; empty for a model that no run of ours left.
        log: The records of `log.jsonl`.
        repo_id: The repository on the Hub; None for a folder on a disk, loaded with the package.
        pictures: File names of those of `training_curves.png`, `attention_pattern.png`, `neighbours.png` and
            `masked.png` that lie beside the card.
        has_second_encoder: Whether the folder `second_encoder` comes along.
        has_pretraining: Whether the folder `pretraining` comes along.
        has_adapter: Whether the folder `adapter` does.
        comes_with_package: Whether it is one of the encoders that `hf_vicreg.load` gives.
        license: Of the weights, by the Hub's short name for it; None: the card names none.
        converted_from: Hub id or folder name of the model whose weights `hf-vicreg convert` has taken.

    Raises:
        FileError: A value that is not what it has to be, with the name of the file that it is from.
    """

    name: str
    config: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    repo_id: str | None = None
    pictures: tuple[str, ...] = ()
    has_second_encoder: bool = False
    has_pretraining: bool = False
    has_adapter: bool = False
    comes_with_package: bool = False
    license: str | None = None
    converted_from: str | None = None

    def __post_init__(self) -> None:
        for file, attribute, check in (
            ("config.json", "config", check_config),
            ("results.json", "results", check_results),
            ("recipe.yaml", "recipe", check_recipe),
        ):
            try:
                object.__setattr__(self, attribute, check(getattr(self, attribute)))
            except FileError as error:
                raise FileError(f"`{file}`: {error}") from None
        records = [check_log_record(one) for one in self.log]
        object.__setattr__(self, "log", [one for one in records if one is not None])
        if self.repo_id is not None and not HUB_ID.fullmatch(self.repo_id):
            raise FileError("`repo`: expected OWNER/NAME, got another.")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise FileError(
                "`license`: expected the Hub's short name of one in small letters, as `apache-2.0` or `other`, got "
                "another."
            )

    @property
    def dataset(self) -> str:
        """What the images are called: of a folder on the machine it ran on, the last part of its path alone."""
        name = str(self.results.get("dataset") or MISSING)
        return PurePath(name).name if name.startswith((".", "~")) or PurePath(name).is_absolute() else name

    @property
    def is_pretrained(self) -> bool:
        """Whether a run's files say that the weights are those of a pretraining without labels."""
        return bool(self.recipe or self.results.get("objective") or self.results.get("method"))

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a head that names classes."""
        return any(str(one).endswith("ForImageClassification") for one in self.config.get("architectures") or ())

    @property
    def multitask(self) -> dict[str, Any]:
        """What `results.json` says of a fine-tuning of the encoder for several tasks; empty where it was none."""
        return {} if self.recipe or self.is_classifier else multitask_record(self.results)

    @property
    def is_dual(self) -> bool:
        """Whether it is a model of images and texts."""
        return self.model_type == DUAL_TYPE

    @property
    def model_type(self) -> str:
        """The architecture, in transformers' word for it."""
        return self.config.get("model_type") or MISSING

    @property
    def is_sparse(self) -> bool:
        """Whether the encoder's attention leaves pairs of tokens out."""
        return self.model_type == "bigbird_vit" and self.config.get("attention_type") != "original_full"


def model_card(facts: CardFacts) -> str:
    """Return the model card in Markdown, metadata in front."""
    template = (resources.files(__package__) / "template.md").read_text()
    marks = {f"BEGIN_{one}": BEGIN.format(one) for one in SECTIONS}
    marks |= {f"END_{one}": END.format(one) for one in SECTIONS}
    body = string.Template(template).substitute(
        marks,
        name=prose(facts.name),
        about=_about(facts),
        snippet=code_block(loading_snippet(facts), "python"),
        loading_note=_loading_note(facts),
        results="\n".join(_results(facts)),
        training="\n".join(_how_trained(facts)),
        attention=_attention(facts),
    )
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}"


def metadata(facts: CardFacts) -> ModelCardData:
    """Return the card's metadata as the Hub reads it."""
    dataset = facts.results.get("hub_dataset")
    measured = evaluation_results(facts.results, facts.dataset)
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag=_pipeline(facts),
        tags=[
            *((facts.results.get("objective") or "vicreg").split("+") if facts.is_pretrained else []),
            facts.model_type,
            *["self-supervised-learning"] * facts.is_pretrained,
            *["sparse-attention"] * facts.is_sparse,
        ],
        datasets=[dataset] if dataset else None,
        base_model=(base := base_model(facts)),
        base_model_relation="finetune" if base and base != facts.converted_from else None,
        metrics=["accuracy"] if measured else None,
        model_name=one_line(facts.name) if measured else None,
        eval_results=measured or None,
    )


def base_model(facts: CardFacts) -> str | None:
    """Return the Hub id of the model whose weights this one began with; None: of none, or of a folder on a disk."""
    found = facts.results.get("evaluations") or []
    tuned = [one.get("details") or {} for one in found if one.get("task") == "finetune_classification"]
    started = [facts.multitask.get("details") or {}] if facts.multitask else tuned if facts.is_classifier else []
    name = started[-1].get("pretrained_model") if started else facts.recipe.get("model_name_or_path")
    name = name or facts.converted_from
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None  # paths are stored whole, or as one word


def _pipeline(facts: CardFacts) -> str:
    if facts.is_dual:
        return "zero-shot-image-classification"
    return "image-classification" if facts.is_classifier else "image-feature-extraction"


def loading_snippet(facts: CardFacts) -> str:
    """Return the code that loads the model and uses it on a list of PIL images called `images`."""
    name = python_string(facts.repo_id or facts.name)
    if facts.is_classifier:
        return f"{CLASSIFIER_IMPORTS}\n\nname = {name}\n{CLASSIFIER_CODE}"
    if facts.is_dual:
        return f"{DUAL_IMPORTS}\n\nname = {name}\n{DUAL_LOCAL_CODE if facts.repo_id is None else DUAL_CODE}"
    features = facts.results.get("features") or facts.config.get("hidden_size") or "features"
    if facts.repo_id is None:
        snippet = PACKAGED_SNIPPET if facts.comes_with_package else LOCAL_SNIPPET
        return snippet.format(name=name, features=features)
    return f"{HUB_IMPORTS}\n\nname = {name}\n{HUB_CODE}  # (images, {features})"


def executable_snippet(*, is_classifier: bool, is_dual: bool = False) -> str:
    """Return the code of a card on the Hub to be run with `name` and `images` given: constants of ours alone."""
    parts = (CLASSIFIER_IMPORTS, CLASSIFIER_CODE) if is_classifier else (HUB_IMPORTS, HUB_CODE)
    parts = (DUAL_IMPORTS, DUAL_CODE) if is_dual else parts
    return "\n".join(parts)


def _about(facts: CardFacts) -> str:
    results = facts.results
    parameters = results.get("encoder_parameters")
    size = f"{parameters:,}" if parameters is not None else MISSING
    if facts.is_classifier:
        labels = facts.config.get("id2label") or {}
        if facts.config.get("problem_type") == "regression":
            return f"A {code(facts.model_type)} that gives {len(labels)} number(s) for an image. Parameters: {size}."
        origin = _origin(facts) if facts.converted_from else "."
        return f"A {code(facts.model_type)} classifier of {len(labels)} classes{origin} Parameters: {size}."
    if facts.is_dual:
        return (
            "Two encoders in one model, a "
            + " and a ".join(code((facts.config.get(key) or {}).get("model_type") or MISSING) for key in DUAL_PARTS)
            + f", that share nothing and were trained together on {count(results, 'num_images')} images of "
            f"{code(facts.dataset)} and their captions: embeddings of both are compared by cosine. Parameters: {size}."
        )
    if facts.multitask:
        return about_tasks(facts.multitask, facts.model_type)
    if not facts.is_pretrained:
        return f"A {code(facts.model_type)} encoder{_origin(facts)} Parameters: {size}."
    method = prose(results.get("method") or "VICReg")
    pretrained = f"pretrained without labels by {method} on {count(results, 'num_images')} images of"
    text = f"A {code(facts.model_type)} encoder, {pretrained} {code(facts.dataset)}. Parameters: {size}."
    if facts.has_second_encoder:
        kind = (facts.recipe.get("second_model") or {}).get("model_type") or "bigbird_vit"
        text += (
            f"\n\nThe folder `second_encoder` holds the encoder of the other branch, a {code(kind)}: the two share "
            "nothing and saw one view of every image each."
        )
    return text


def _origin(facts: CardFacts) -> str:
    if facts.converted_from:
        return (
            f" with the weights of {code(facts.converted_from)}, converted; what that was trained on, its card says."
        )
    return "; what its weights were trained on, no file beside them says."


def _loading_note(facts: CardFacts) -> str:
    channels = facts.config.get("num_channels", 3)
    kind = "PIL images" if channels == 3 else f"file names, or of arrays of {channels} channels"
    if facts.repo_id is None:
        return f"`images` is a list of {kind}."
    lines = [
        f"`images` is a list of {kind}. The code of the model lies in this repository and needs torch and "
        "transformers alone. Once `hf_vicreg` is installed and imported, `trust_remote_code` is not needed."
    ]
    if facts.has_second_encoder:
        lines.append('The other encoder: `AutoModel.from_pretrained(name, subfolder="second_encoder", ...)`.')
    if facts.has_pretraining:
        lines.append(
            "The encoder with its expander and the loss, to go on with pretraining: "
            '`AutoModelForPreTraining.from_pretrained(name, subfolder="pretraining", ...)`.'
        )
    if facts.multitask:
        lines.append(HEADS_NOTE)
    if facts.has_adapter:
        lines.append(
            "The weights hold what low-rank adapters have learned. The adapters alone, to put on the model that they "
            'were made for: `PeftModel.from_pretrained(model, name, subfolder="adapter")`.'
        )
    return "\n\n".join(lines)


def _results(facts: CardFacts) -> Iterator[str]:
    if facts.is_dual:
        yield from retrieval_table(facts.results)
    elif not facts.is_classifier and not facts.multitask:
        source = bool(facts.recipe.get("model_name_or_path"))
        yield from knn_table(facts.results, facts.dataset, second_encoder=facts.has_second_encoder, has_source=source)
    elif facts.is_classifier and not facts.results.get("evaluations"):
        yield f"Accuracy on held-out images: {MISSING}."
    yield from dense_tables(facts.results)
    yield from evaluations_table(facts.results)
    if "neighbours.png" in facts.pictures:
        yield "\n![Held-out images and their nearest neighbours](neighbours.png)"


def _how_trained(facts: CardFacts) -> Iterator[str]:
    if not facts.multitask:
        yield from _fine_tuning(facts) if facts.is_classifier else _training(facts)
        return
    yield from tasks_table(facts.multitask)
    if "training_curves.png" in facts.pictures:
        yield "\n![The loss by step](training_curves.png)"


def _fine_tuning(facts: CardFacts) -> Iterator[str]:
    found = [one for one in facts.results.get("evaluations") or [] if one.get("task") == "finetune_classification"]
    last = found[-1] if found else {}
    details, data, machine = (last.get(key) or {} for key in ("details", "data", "environment"))
    yield "| | |\n| --- | --- |"
    yield f"| pretrained encoder | {prose(details.get('pretrained_model') or MISSING)} |"
    yield f"| data | {prose(data.get('dataset') or MISSING)} |"
    yield f"| labelled images | {count(details, 'num_labelled')} |"
    yield f"| unlabelled images | {count(details, 'num_unlabelled')} |"
    yield f"| steps | {count(details, 'steps')} |"
    yield f"| hardware | {prose(machine.get('hardware') or MISSING)} |"
    yield f"| time | {figure(details, 'training_seconds', '.1f', ' s')} |"
    if "training_curves.png" in facts.pictures:
        yield "\n![The loss by step](training_curves.png)"


def _training(facts: CardFacts) -> Iterator[str]:
    results, steps = facts.results, [one for one in facts.log if "loss" in one]
    last = steps[-1] if steps else {}
    speeds = [one["images_per_second"] for one in steps if "images_per_second" in one]
    speed = f"{statistics.median_low(speeds):.0f} images/s (median of the log)" if speeds else MISSING
    yield "| | |\n| --- | --- |"
    yield f"| data | {count(results, 'num_images')} images of {code(facts.dataset)} |"
    if facts.recipe.get("model_name_or_path"):
        yield f"| began with | the weights of {_named(facts, 'model_name_or_path')} |"
    if facts.recipe.get("teacher"):
        yield f"| taught by | {_named(facts, 'teacher')}, weight {code(facts.recipe.get('teacher_weight'))} |"
    if facts.recipe.get("teacher_features"):
        weight = code(facts.recipe.get("teacher_weight"))
        yield f"| taught by | stored features, {_named(facts, 'teacher_features')}, weight {weight} |"
    yield f"| steps | {count(results, 'steps')}{_unfinished(results)} |"
    yield f"| steps skipped as not finite | {count(results, 'skipped_steps')} |"
    batch = facts.recipe.get("statistics_batch_size") or facts.recipe.get("batch_size") or MISSING
    yield f"| batch | {batch} images |"
    yield f"| hardware | {prose(results.get('hardware') or MISSING)} |"
    yield f"| time | {figure(results, 'training_seconds', '.1f', ' s')} |"
    yield f"| throughput | {speed} |"
    if results.get("flops_per_step"):
        yield f"| products of matrices | {compute(results['flops_per_step'], steps)} |"
    yield f"| loss at the end | {figure(last, 'loss', '.3f')} |"
    for part in results.get("loss_parts") or VICREG_PARTS:
        yield f"| its {part}, unweighted | {figure(last, part, '.4f')} |"
    if "training_curves.png" in facts.pictures:
        what = "The loss, its parts and k-NN accuracy" if results.get("knn_accuracy") else "The loss and its parts"
        yield f"\n![{what} by step](training_curves.png)"
    if "masked.png" in facts.pictures:
        yield "\n![Images, what the model sees of them, and what it paints where it sees nothing](masked.png)"
    if facts.recipe:
        yield "\nThe command, with the recipe below as `recipe.yaml`:\n"
        yield f"{code_block(training_command(facts), 'bash')}\n"
        unpublished = [_named(facts, key) for key in _folders(facts)]
        if unpublished:
            yield (
                f"The author's {' and '.join(unpublished)} was a folder on a disk and is not part of this: the run "
                "can be repeated only with something like it in its place.\n"
            )
        recipe = {key: value for key, value in facts.recipe.items() if key not in OF_THE_OWNER}
        yield code_block(yaml.safe_dump(recipe, sort_keys=False).strip(), "yaml")


def _unfinished(results: dict[str, Any]) -> str:
    planned = results.get("planned_steps")
    return "" if planned in (None, results.get("steps")) else f" of {planned:,} planned: this run is not finished"


def training_command(facts: CardFacts) -> str:
    """Return the command that trains the model again, the images' place aside."""
    if facts.recipe.get("train_dir"):
        data = "--train_dir FOLDER_OF_IMAGES"
    else:
        data = f"--dataset_name {shlex.quote(facts.results.get('hub_dataset') or facts.dataset)}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", facts.name.rpartition("/")[2]) or "again"
    data += "".join(f" --{key} {OF_OTHERS[key]}" for key in _folders(facts))
    return f"accelerate launch -m hf_vicreg.training.pretrain --config recipe.yaml {data} --output_dir runs/{name}"


def with_folders_named(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without paths; of a folder of a model `./NAME` is left, to tell it from an id of the Hub."""
    folders = {key: f"./{PurePath(recipe[key]).name}" for key in OF_OTHERS if is_path(recipe.get(key))}
    return without_paths(recipe) | folders


def _folders(facts: CardFacts) -> list[str]:
    """The fields of a recipe that name a folder on a disk, of which `./NAME` is stored; neither ids nor ours."""
    return [key for key in OF_OTHERS if is_path(facts.recipe.get(key))]


def _named(facts: CardFacts, key: str) -> str:
    """What the card calls a model that a run takes something from."""
    return code(without_paths(facts.recipe[key]))


def _attention(facts: CardFacts) -> str:
    if facts.is_dual:
        return "That of the two encoders; the pattern of a sparse one is in the configuration."
    if facts.model_type != "bigbird_vit":
        return f"That of {code(facts.model_type)}, dense or none."
    if not facts.is_sparse:
        return "Dense: every patch sees every other."
    density = figure(facts.results, "attention_density", ".3f")
    text = (
        "BigBird's, on a 2-D grid: every tile of patches sees the tiles around it and a few random ones, the same in "
        "training and use; CLS and registers see and are seen by all. Share of the pairs of tokens that the pattern "
        f"allows, on the views of training: {density}."
    )
    if "attention_pattern.png" in facts.pictures:
        text += "\n\n![Which tile sees which, at the encoder's own image size](attention_pattern.png)"
    return text
