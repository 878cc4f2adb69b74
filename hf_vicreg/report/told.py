"""The parts of a page that a run's files alone tell: verdict, figures, curves, what was run."""

import html
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

from hf_vicreg._version import __version__
from hf_vicreg.model_cards.escaping import printable
from hf_vicreg.report.page import section, shown, side_by_side
from hf_vicreg.report.run_facts import RunFacts
from hf_vicreg.training.monitor.diagnosis import Record

MISSING = "not measured"
PLAN = (
    ("batch_size", "batch"),
    ("num_train_epochs", "epochs"),
    ("learning_rate", "learning rate"),
    ("optim", "optimiser"),
    ("mixed_precision", "precision"),
    ("seed", "seed"),
)
NOT_COMPARED = {"resume_from_checkpoint", "max_time", "plan_only"}
MAX_POINTS = 1000  # of a curve: more than a screen has columns for it


class Panel(NamedTuple):
    """A panel of curves.

    Attributes:
        title: Above it.
        curves: Names in the log, each with what it is called here.
        note: What to look for, in a few words.
        log: Whether its scale is logarithmic, where all values are above 0.
    """

    title: str
    curves: dict[str, str]
    note: str
    log: bool = False


LOSS = Panel("Loss", {"loss": "loss"}, "of the whole batch")
PANELS = (
    Panel(
        "Accuracy on held-out images",
        {
            "knn_accuracy": "k-NN",
            "linear_accuracy": "linear",
            "second_knn_accuracy": "k-NN, second encoder",
            "second_linear_accuracy": "linear, second encoder",
        },
        "rises; measured at the points",
    ),
    Panel(
        "Effective rank",
        {"embedding_rank": "embeddings", "encoder_rank": "encoder", "second_encoder_rank": "second encoder"},
        "well above 2; the encoder's rises",
    ),
    Panel(
        "Spread",
        {
            "embedding_std_mean": "embeddings, mean",
            "embedding_std_min": "embeddings, smallest",
            "encoder_spread": "encoder",
            "second_encoder_spread": "second encoder",
        },
        "a collapse is at 0",
    ),
    Panel("Learning rate", {"learning_rate": "learning rate"}, "warm-up, then a cosine"),
    Panel("Norm of the gradient", {"grad_norm_max": "largest", "grad_norm": "last"}, "steady", log=True),
    Panel("Images per second", {"images_per_second": "images/s"}, "steady"),
    Panel("Waiting for images", {"data_wait_ratio": "waiting"}, "share of the time; below 0.5"),
)


def heading(runs: list[RunFacts], sections: dict[str, str]) -> str:
    """Return the page's head: names, verdicts, figures, and links to its sections, by name and title."""
    title = " and ".join(run.name for run in runs)
    bodies = []
    for run in runs:
        figures = "".join(f"<div><dt>{shown(name)}</dt><dd>{shown(value)}</dd></div>" for name, value in run.figures())
        kind = "healthy" if run.is_healthy else "unwell"
        bodies.append(
            f'<p class="verdict {kind}">{shown(run.verdict)}</p><dl class="figures">{figures}</dl>'
            f'<p class="made">made by <code>hf-vicreg doctor RUN</code></p>'
        )
    links = "".join(f'<a href="#{shown(name)}">{shown(text)}</a>' for name, text in sections.items())
    return (
        f'<header><p class="kind">hf-vicreg {shown(__version__)} · run report</p><h1>{shown(title)}</h1>'
        f"{side_by_side([run.name for run in runs], bodies)}<nav>{links}</nav></header>"
    )


def curves_section(panels: list[dict[str, Any]], made_by: str) -> str:
    """Return the section that the scripts draw curves into."""
    body = (
        '<div class="tools"><button type="button" id="reset-zoom" disabled>whole run</button>'
        '<span class="hint">Point at a curve to read it; drag across to zoom, double-click for the whole run.</span>'
        "</div>"
        f'<div class="panels" id="curves">{"".join(map(_panel, panels))}</div>'
    )
    return section("training", "Training, step by step", "Every line of the log, all by its step.", body, made_by)


def _panel(panel: dict[str, Any]) -> str:
    return (
        f'<figure class="panel"><figcaption>{shown(panel["title"])}'
        f"<small>{shown(panel['note'])}{', logarithmic' if panel['log'] else ''}</small></figcaption>"
        f'<ul class="legend"></ul><svg role="img" aria-label="{shown(panel["title"])} by step"></svg></figure>'
    )


def recipe_section(runs: list[RunFacts]) -> str:
    """Return what was run: in a few lines, and the whole recipe; of two runs, in what they differ."""
    bodies = [f'<table class="facts"><tbody>{"".join(map(_row, facts_of(run)))}</tbody></table>' for run in runs]
    body = side_by_side([run.name for run in runs], bodies)
    if len(runs) > 1:
        body += _differences(runs)
    for run in runs:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=False)
        whose = f" of {shown(run.name)}" if len(runs) > 1 else ""
        escaped = shown_lines(text)
        body += f"<details><summary>The whole recipe{whose}</summary><pre>{escaped}</pre></details>"
    return section(
        "recipe", "What was run", "Model, plan and machine, from the run's own files.", body,
        "hf-vicreg pretrain --config recipe.yaml --output_dir RUN",
    )  # fmt: skip


def shown_lines(text: str) -> str:
    """Return several lines of text as HTML shows them in a `pre`."""
    return "\n".join(shown_keeping_blanks(line) for line in text.splitlines())


def shown_keeping_blanks(line: str) -> str:
    """Return a line of text for a `pre`, its blanks as they are."""
    return html.escape(printable(line), quote=True)


def facts_of(run: RunFacts) -> list[tuple[str, str]]:
    """Return what was run, by name."""
    model, results = run.recipe.get("model") or {}, run.results
    parameters = results.get("encoder_parameters")
    size, patch = model.get("image_size"), model.get("patch_size")
    architecture = str(model.get("model_type", MISSING))
    if parameters is not None:
        architecture += f", {parameters / 1e6:.2f} M parameters"
    found = [("encoder", architecture)]
    if None not in (model.get("num_hidden_layers"), model.get("num_attention_heads"), model.get("hidden_size")):
        found.append(
            (
                "layers",
                f"{model['num_hidden_layers']}, {model['num_attention_heads']} heads, {model['hidden_size']} wide",
            )
        )
    if size is not None:
        views = (run.recipe.get("views") or {}).get("image_size")
        sizes = f"{size} pixels" if views in (None, size) else f"views of {views} pixels, used with {size}"
        found.append(("images", f"{sizes}, patches of {patch}"))
    if results.get("attention_density") is not None:
        found.append(("attention", f"density {results['attention_density']:.3f} on the views"))
    if results.get("dataset") is not None:
        found.append(("data", f"{results.get('num_images') or MISSING} images of {results['dataset']}"))
    expander = (run.recipe.get("vicreg") or {}).get("expander_sizes")
    if expander:
        found.append(("expander", " - ".join(map(str, expander))))
    found += [(name, str(run.recipe[key])) for key, name in PLAN if run.recipe.get(key) is not None]
    found.append(("machine", str(results.get("hardware") or MISSING)))
    return found


def _row(fact: tuple[str, str]) -> str:
    return f"<tr><th>{shown(fact[0])}</th><td>{shown(fact[1])}</td></tr>"


def _differences(runs: list[RunFacts]) -> str:
    flat = [flattened(run.recipe) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [
        [key, *(one.get(key, "not set") for one in flat)]
        for key in keys
        if key not in NOT_COMPARED and len({one.get(key, "not set") for one in flat}) > 1
    ]
    if not rows:
        return '<p class="none">The two recipes are the same.</p>'
    head = "".join(f"<th>{shown(name)}</th>" for name in ("", *(run.name for run in runs)))
    cells = "".join(f"<tr>{''.join(f'<td>{shown(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<h3>Where their recipes differ</h3><div class="wide"><table class="facts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as text by their dotted names."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return found


def panels_of(runs: list[list[Record]], levels: dict[str, float], parts: Iterable[str]) -> list[dict[str, Any]]:
    """Return the panels that have something to show.

    Args:
        runs: The records of one run or of several.
        levels: Accuracies to compare with, by name, that are no curves.
        parts: Names of the parts of the loss.

    Returns:
        For each panel `title`, `note`, `log`, `curves`: `run`, `label`, `steps` and `values`, all finite, and
        `levels`: `label` and `value`.
    """
    found = []
    of_parts = Panel("Its parts", {name: name.replace("_", " ") for name in parts}, "unweighted", log=True)
    for panel in (LOSS, of_parts, *PANELS):
        curves: list[dict[str, Any]] = [
            {"run": run, "label": label, "steps": [step for step, _ in points], "values": [one for _, one in points]}
            for run, records in enumerate(runs)
            for key, label in panel.curves.items()
            if (points := thinned(points_of(records, key)))
        ]
        if curves:
            own = levels if "knn_accuracy" in panel.curves else {}
            lines = [{"label": label, "value": value} for label, value in own.items()]
            log = panel.log and all(value > 0 for curve in curves for value in curve["values"])
            head = {"title": panel.title, "note": panel.note, "log": log}
            found.append(head | {"curves": curves, "levels": lines})
    return found


def points_of(records: list[Record], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of a figure where it is finite."""
    found = [(record["step"], float(record[key])) for record in records if key in record]
    return [(step, value) for step, value in found if math.isfinite(value)]


def thinned(points: list[tuple[int, float]], most: int = MAX_POINTS) -> list[tuple[int, float]]:
    """Return at most `most` points: the lowest and the highest of every stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    kept = []
    runs = most // 2
    for at in range(runs):
        some = points[at * len(points) // runs : (at + 1) * len(points) // runs]
        ends = {min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
