"""The health of a run told afterwards, from its log: `hf-vicreg doctor RUN`, the end of a run, and `results.json`."""

import math
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.schema import FileError, check_recipe, read_checked
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.monitor.diagnosis import MIN_LINES, Record, Watch
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.objectives.entry import ObjectiveEntry
from hf_vicreg.training.objectives.registry import entry_of
from hf_vicreg.training.objectives.vicreg import VICREG

# what is shown of a line, and what is normal
FIGURES = {
    "embedding_std_mean": "towards gamma; a collapse below a tenth of it",
    "embedding_std_min": "no dimension far below the mean",
    "embedding_rank": "well above 2; at most 1 / (1 / D + 1 / (N - 1))",
    "covariance_ratio": "falling towards 1, the noise of a batch of independent dimensions",
    "encoder_std_mean": "steady: its scale is the encoder's own",
    "encoder_spread": "0.1 to 1; a collapse below 0.02",
    "encoder_rank": "rising",
    "second_encoder_spread": "as encoder_spread",
    "second_encoder_rank": "rising",
    "grad_norm_max": "steady",
    "data_wait_ratio": "below 0.5",
    "images_per_second": "steady",
}
NO_GAMMA = {"embedding_std_mean": "towards 1; a collapse below a tenth of it"}  # embeddings are scaled to that
OF_EMBEDDINGS = ("embedding_std_mean", "embedding_std_min", "embedding_rank", "covariance_ratio")


def read_run(folder: Path) -> tuple[list[Record], float, ObjectiveEntry]:
    """Return the lines of a run's log, gamma, the target of its embeddings' standard deviation, and its objective.

    Raises:
        InputError: Not a run's folder, or no line of a training step in it.
    """
    recipe, log = folder / "recipe.yaml", folder / LOG_FILE
    for path in (recipe, log):
        if not path.is_file():
            raise InputError(f"`RUN`: expected the folder of a run, {folder} has no {path.name}; name its output_dir.")
    try:
        found = read_checked(recipe, check_recipe)
        gamma = (found.get("vicreg") or {}).get("gamma") or 1.0
    except FileError as error:
        raise InputError(
            f"`RUN`: expected the recipe of a run in {recipe}, it cannot be read as one: {error}"
        ) from None
    try:
        records = read_log(log)
    except UnicodeDecodeError as error:
        raise InputError(f"`RUN`: expected lines of JSON in {log}, it is not text.") from error
    if not any("loss" in record for record in records):
        raise InputError(f"`RUN`: expected lines of training steps in {log}, found none; wait for the first.")
    return records, gamma, entry_of(found)


def watched(records: list[Record], gamma: float, objective: ObjectiveEntry = VICREG) -> Watch:
    """Return a watch that has read every line."""
    watch = Watch(gamma, objective)
    for record in records:
        watch.follow(record)
    return watch


def health_of(records: list[Record], gamma: float, objective: ObjectiveEntry = VICREG) -> dict[str, Any]:
    """Return what `results.json` says about health: the last line's figures and all that was found wrong.

    Returns:
        `health` with the figures of `FIGURES`, and `verdicts`, a list of dictionaries with `name`, `finding`,
        `remedy`, `step` (of the line that showed it first) and `present` (whether the last line still does).
    """
    lines = [record for record in records if "loss" in record]
    watch = watched(lines, gamma, objective)
    return {
        "health": {key: lines[-1][key] for key in FIGURES if key in lines[-1]} if lines else {},
        "verdicts": [vars(one) | {"present": name in watch.present} for name, one in watch.past.items()],
    }


def health_table(records: list[Record], objective: ObjectiveEntry = VICREG) -> str:
    """Return the figures of the first, the middle and the last line side by side, each once, with what is normal."""
    figures = FIGURES if objective.vicreg_weights else FIGURES | NO_GAMMA
    if not objective.uses_expander:  # without an expander there are no embeddings
        figures = {key: normal for key, normal in figures.items() if key not in OF_EMBEDDINGS}
    lines = [record for record in records if "loss" in record]
    shown = [lines[at] for at in sorted({0, len(lines) // 2, len(lines) - 1})]
    rows = [("", *(f"step {line['step']}" for line in shown), "normal")]
    rows += [
        (key, *(_figure(line.get(key)) for line in shown), normal)
        for key, normal in figures.items()
        if key in shown[-1]
    ]
    last = len(shown) + 1
    widths = [max(len(row[column]) for row in rows) for column in range(last)]
    return "\n".join(
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{row[at]:>{widths[at]}}" for at in range(1, last)), row[last]]
        ).rstrip()
        for row in rows
    )


def report(records: list[Record], gamma: float, objective: ObjectiveEntry = VICREG) -> tuple[str, bool]:
    """Return what the doctor says, and whether the run is healthy at its last line."""
    watch = watched(records, gamma, objective)
    lines = sum("loss" in record for record in records)
    paragraphs = [health_table(records, objective)]
    paragraphs += [f"{verdict} (since step {verdict.step})" for verdict in watch.present.values()]
    paragraphs += [
        f"Passed: {verdict} (at step {verdict.step})"
        for name, verdict in watch.past.items()
        if name not in watch.present
    ]
    step = records[-1]["step"]
    if lines < MIN_LINES:
        paragraphs.append(f"The log has {lines} line(s) so far; trends need {MIN_LINES} and the end of the warm-up.")
    if watch.present:
        paragraphs.append(f"{len(watch.present)} thing(s) wrong.")
    elif lines < MIN_LINES:
        paragraphs.append(f"Nothing wrong so far at step {step}, but the log is too short to tell more.")
    else:
        paragraphs.append(f"Healthy: nothing wrong at step {step}.")
    return "\n\n".join(paragraphs), not watch.present


def _figure(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:,.0f}"
