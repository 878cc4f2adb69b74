"""The verbs `embed`, `paint`, `evaluate` and `finetune` of `hf-vicreg`: flags first, work when asked for."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_vicreg.training.command import checked_count
from hf_vicreg.training.errors import RunStopped, log_to_stderr, place_for
from hf_vicreg.training.evaluation.arguments import (
    FewLabelsArguments,
    FinetuneArguments,
    ImageTextArguments,
    KnnArguments,
    LinearArguments,
    RetrievalArguments,
)
from hf_vicreg.training.prepare.arguments import EmbedArguments, embed_arguments
from hf_vicreg.training.run.flags import add_fields
from hf_vicreg.training.tasks.arguments import DenseArguments

DATA = "--dataset_name my_labelled_images"
EVALUATIONS = {
    "knn": (KnnArguments, "k-NN accuracy of features", f"hf-vicreg evaluate knn runs/mine {DATA}"),
    "linear": (LinearArguments, "accuracy of a linear probe", f"hf-vicreg evaluate linear runs/mine {DATA}"),
    "retrieval": (RetrievalArguments, "mean average precision", f"hf-vicreg evaluate retrieval runs/mine {DATA}"),
    "few-labels": (
        FewLabelsArguments,
        "accuracy with few labels, linear and fine-tuned",
        f"hf-vicreg evaluate few-labels runs/mine {DATA} --labels 10% 2 --max_steps 10 --num_seeds 2",
    ),
}
EVALUATIONS["image-text"] = (
    ImageTextArguments,
    "recall between images and captions, and zero-shot accuracy",
    "hf-vicreg evaluate image-text runs/captions --dataset_name my_captions --caption_column caption",
)
EVALUATIONS["dense"] = (
    DenseArguments,
    "masks by patch tokens, k-NN and linear, without fine-tuning",
    "hf-vicreg evaluate dense runs/mine --dataset_name my_masks --image_height 64 --image_width 64",
)
EMBED_EXAMPLE = "hf-vicreg embed my_images runs/mine embeddings"
PAINT_EXAMPLE = "hf-vicreg paint photo.png runs/mae --mask 40,40,120,120 --output painted.png"
FINETUNE_EXAMPLE = (
    f"hf-vicreg finetune classification runs/mine {DATA} --output_dir runs/classifier --num_train_epochs 5"
)


def add_verbs(verbs: Any) -> Any:
    """Add `embed`, `paint`, `evaluate` and `finetune` to the command's sub-parsers; returns those of `finetune`."""
    embed = add_command(
        verbs,
        "embed",
        EmbedArguments,
        "embeddings of images, as a parquet data set",
        EMBED_EXAMPLE,
        _embed,
        images="folder of images, parquet file, local `datasets` folder, Hub id, or `digits`",
        out="new or empty folder, or an interrupted call's to go on in",
    )
    embed.add_argument("--num_processes", metavar="INT", type=int, help="Processes on this machine; default: 1.")
    add_paint(verbs)
    evaluate = verbs.add_parser("evaluate", help="what a model's features are worth on labelled images")
    whats = evaluate.add_subparsers(required=True, metavar="WHAT")
    for name, (kind, text, example) in EVALUATIONS.items():
        add_command(whats, name, kind, text, example, _evaluate)
    search = verbs.add_parser("search", help="images found by words, among those embedded by the same model")
    search.add_argument("model", metavar="MODEL", help="folder or Hub id of a model of images and texts")
    search.add_argument("embeddings", metavar="EMBEDDINGS", help="folder that `hf-vicreg embed` made with MODEL")
    search.add_argument("words", metavar="WORDS", help="what the images shall show, in quotes")
    search.add_argument("--num_results", type=int, default=10, help="images to name (default: 10)")
    search.set_defaults(run=_search)
    finetune = verbs.add_parser("finetune", help="a pretrained encoder for a task of your own")
    tasks = finetune.add_subparsers(required=True, metavar="TASK")
    add_command(
        tasks,
        "classification",
        FinetuneArguments,
        "a classifier of images",
        FINETUNE_EXAMPLE,
        _finetune_classification,
    )
    return tasks


def add_paint(verbs: Any) -> None:
    """Add `paint` to the command's sub-parsers."""
    paint = verbs.add_parser(
        "paint",
        help="paint the masked part of an image, with a model of masked images",
        epilog=f"example: {PAINT_EXAMPLE}",
    )
    paint.add_argument("image", metavar="IMAGE", help="file of an image")
    paint.add_argument("model", metavar="MODEL", help="folder or Hub id of a SimMIM or MAE model, or of its run")
    paint.add_argument(
        "--mask",
        required=True,
        help="image of the same size, white where to paint; or LEFT,TOP,RIGHT,BOTTOM in pixels",
    )
    paint.add_argument("--output", required=True, metavar="FILE", help="image file to write")
    paint.add_argument(
        "--num_passes", type=int, default=4, help="most certain tiles first (default: 4); 1: all at once"
    )
    paint.add_argument("--temperature", type=float, default=0.0, help="above 0: draw; 1: with the model's own spread")
    paint.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    paint.set_defaults(run=_paint)


def add_command(
    whats: Any,
    name: str,
    kind: type,
    text: str,
    example: str,
    run: Any,
    model: str = "folder or Hub id of any vision model of transformers",
    images: str = "",
    out: str = "",
) -> argparse.ArgumentParser:
    """Add a command whose flags are the fields of a dataclass, with an example; returns its parser.

    `model`, `images` and `out` say what the words before the flags are; one without a text is not taken.
    """
    parser = whats.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for word, said in (("images", images), ("model", model), ("out", out)):
        if said:
            parser.add_argument(word, metavar=word.upper(), help=said)
    add_fields(parser, kind)
    parser.set_defaults(run=run, arguments_class=kind, what=name)
    return parser


def arguments_of(parsed: argparse.Namespace) -> Any:
    """Return the flags of a command as its dataclass."""
    kind = parsed.arguments_class
    return kind(**{one.name: getattr(parsed, one.name) for one in dataclasses.fields(kind)})


def _paint(parsed: argparse.Namespace) -> None:
    from hf_vicreg.painting import paint

    log_to_stderr()
    flags = ("mask", "output", "num_passes", "temperature", "seed")
    done = paint(parsed.image, parsed.model, **{name: getattr(parsed, name) for name in flags})
    painted = done.pass_of_patch > 0
    print(
        f"{parsed.output}: {int(painted.sum())} of {painted.numel()} patches painted in "
        f"{int(done.pass_of_patch.max())} passes"
    )


def _embed(parsed: argparse.Namespace) -> int:
    log_to_stderr()
    arguments = embed_arguments(vars(arguments_of(parsed)))
    if checked_count(parsed.num_processes) > 1:
        from hf_vicreg.training.launch.spawn import run_processes

        given = {name: value for name, value in vars(arguments).items() if value is not None}
        flags = [f"--{name}={value}" for name, value in given.items()]
        words = ["embed", *flags, "--", parsed.images, parsed.model, parsed.out]
        return run_processes(words, parsed.num_processes, "hf_vicreg.cli")
    from hf_vicreg.training.launch.distributed import leave_processes
    from hf_vicreg.training.launch.signals import stop_exit_code
    from hf_vicreg.training.prepare.embed import embed_images

    try:
        with place_for("OUT", parsed.out):
            done = embed_images(parsed.images, parsed.model, Path(parsed.out), arguments)
    except RunStopped:
        return stop_exit_code()
    finally:
        leave_processes()
    if os.environ.get("RANK", "0") == "0":
        print(f"{done.num_rows:,} images embedded, {done.num_unusable:,} unreadable left out")
        print(f"\nTo read them: datasets.load_dataset({parsed.out!r}, split='train')")
    return 0


def _evaluate(parsed: argparse.Namespace) -> None:
    log_to_stderr()
    from hf_vicreg.training.evaluation.evaluate import evaluate_knn, evaluate_linear, evaluate_retrieval
    from hf_vicreg.training.image_text.evaluate import evaluate_image_text
    from hf_vicreg.training.tasks.classification.few_labels import evaluate_few_labels
    from hf_vicreg.training.tasks.segmentation.dense import evaluate_dense

    runs: dict[str, Callable[[str, Any], dict[str, Any]]] = {
        "knn": evaluate_knn,
        "linear": evaluate_linear,
        "retrieval": evaluate_retrieval,
        "few-labels": evaluate_few_labels,
        "image-text": evaluate_image_text,
        "dense": evaluate_dense,
    }
    with place_for("output_dir", parsed.output_dir or parsed.model):
        runs[parsed.what](parsed.model, arguments_of(parsed))


def _search(parsed: argparse.Namespace) -> None:
    log_to_stderr()
    from hf_vicreg.training.image_text.search import search

    for found in search(parsed.model, parsed.embeddings, parsed.words, parsed.num_results):
        print(f"{found.cosine:.3f}  {found.place}")


def _finetune_classification(parsed: argparse.Namespace) -> int:
    from hf_vicreg.training.tasks.classification.command import finetune_classification

    return run_task(finetune_classification, parsed)


def run_task(task: Any, parsed: argparse.Namespace) -> int:
    """Run a fine-tuning with the flags of its command; return the exit code, 75 for one that stopped when asked."""
    from hf_vicreg.training.launch.distributed import leave_processes
    from hf_vicreg.training.launch.signals import stop_exit_code

    log_to_stderr()
    try:
        with place_for("output_dir", parsed.output_dir):
            task(parsed.model, arguments_of(parsed))
        return 0
    except RunStopped:
        return stop_exit_code()
    finally:
        leave_processes()
