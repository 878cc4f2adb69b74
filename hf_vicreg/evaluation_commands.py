"""The verbs `evaluate` and `finetune` of `hf-vicreg`: flags from dataclasses, work imported when asked for."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from hf_vicreg.training.errors import RunStopped, log_to_stderr, place_for
from hf_vicreg.training.evaluation.arguments import (
    FewLabelsArguments,
    FinetuneArguments,
    KnnArguments,
    LinearArguments,
    RetrievalArguments,
)
from hf_vicreg.training.run.flags import add_fields

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
FINETUNE_EXAMPLE = (
    f"hf-vicreg finetune classification runs/mine {DATA} --output_dir runs/classifier --num_train_epochs 5"
)


def add_verbs(verbs: Any) -> Any:
    """Add `evaluate` and `finetune` to the command's sub-parsers; returns those of `finetune`."""
    evaluate = verbs.add_parser("evaluate", help="what a model's features are worth on labelled images")
    whats = evaluate.add_subparsers(required=True, metavar="WHAT")
    for name, (kind, text, example) in EVALUATIONS.items():
        add_command(whats, name, kind, text, example, _evaluate)
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


def add_command(
    whats: Any,
    name: str,
    kind: type,
    text: str,
    example: str,
    run: Any,
    model: str = "folder or Hub id of any vision model of transformers",
) -> None:
    """Add a command whose flags are the fields of a dataclass, with an example."""
    parser = whats.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=model)
    add_fields(parser, kind)
    parser.set_defaults(run=run, arguments_class=kind, what=name)


def arguments_of(parsed: argparse.Namespace) -> Any:
    """Return the flags of a command as its dataclass."""
    kind = parsed.arguments_class
    return kind(**{one.name: getattr(parsed, one.name) for one in dataclasses.fields(kind)})


def _evaluate(parsed: argparse.Namespace) -> None:
    log_to_stderr()
    from hf_vicreg.training.evaluation.evaluate import evaluate_knn, evaluate_linear, evaluate_retrieval
    from hf_vicreg.training.tasks.classification.few_labels import evaluate_few_labels

    runs: dict[str, Callable[[str, Any], dict[str, Any]]] = {
        "knn": evaluate_knn,
        "linear": evaluate_linear,
        "retrieval": evaluate_retrieval,
        "few-labels": evaluate_few_labels,
    }
    with place_for("output_dir", parsed.output_dir or parsed.model):
        runs[parsed.what](parsed.model, arguments_of(parsed))


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
