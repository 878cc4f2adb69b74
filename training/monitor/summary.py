"""What a finished run says at its end."""

import shlex
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.card import LOCAL_SNIPPET
from hf_vicreg.model_cards.dual import DUAL_IMPORTS, DUAL_LOCAL_CODE, ROWS
from hf_vicreg.model_cards.escaping import python_string
from hf_vicreg.training.monitor.doctor import health_table
from hf_vicreg.training.objectives.pair_losses import PAIR_LOSSES
from hf_vicreg.training.objectives.registry import entry_of
from hf_vicreg.training.run.arguments import seconds_of


def summary(
    folder: Path,
    results: dict[str, Any],
    records: list[dict[str, Any]],
    *,
    is_dual: bool = False,
    has_source: bool = False,
    seconds: float = 0.0,
    time_budget: str | None = None,
) -> str:
    """Return what a finished run says at its end: accuracies side by side, its health, and how to load it.

    Args:
        folder: The run's.
        results: What `results.json` holds.
        records: The lines of its log.
        is_dual: Whether it is a run of images and captions.
        has_source: Whether its encoder began with the weights of another.
        seconds: That the whole command took.
        time_budget: What was given for it.
    """
    lines = [f"Trained in {results['training_seconds']:.0f} s; attention density {results['attention_density']:.3f}."]
    seconds = max(seconds, results["training_seconds"])  # the latter is also of what was resumed
    if time_budget is not None and seconds > seconds_of(time_budget):
        lines.append(f"Longer than the {time_budget} given: {seconds:.0f} s in all.")
    kinds = {"knn_accuracy": f"{results['knn_neighbours']}-NN", "linear_accuracy": "linear"}
    measured = {title: results[kind] for kind, title in kinds.items() if results[kind]}
    if measured:
        lines.append(
            f"Accuracy, {results['knn_test_samples']} held-out images against {results['knn_train_samples']} labelled "
            "ones:"
        )
        lines.append(f"  {'':<18} " + "  ".join(f"{title:<6}" for title in measured))
        for key, text in (
            ("raw_pixels", "raw pixels"),
            ("untrained", "what it began with" if has_source else "untrained encoder"),
            ("trained", "trained encoder"),
            ("raw_trained", "its weights, not averaged"),
            ("second_untrained", "second, untrained"),
            ("second_trained", "second, trained"),
        ):
            if any(key in values for values in measured.values()):
                found = (f"{values[key]:<6.3f}" if key in values else "-     " for values in measured.values())
                lines.append(f"  {text:<18} " + "  ".join(found))
    if retrieval := results.get("image_text"):
        lines.append("Held-out images and captions:")
        lines += [
            f"  {text:<25} recall at 1: {retrieval[f'{key}_recall_1']:.3f}, at 10: {retrieval[f'{key}_recall_10']:.3f}"
            for key, text in ROWS
        ]
    if any("loss" in record for record in records):
        name = results["objective"]
        entry = PAIR_LOSSES.get(name) or entry_of({"objective": name})
        lines.append(f"\n{health_table(records, entry)}\n")
        for verdict in results["verdicts"]:
            when = "since" if verdict["present"] else "at"
            lines.append(
                f"{verdict['name']} ({when} step {verdict['step']}): {verdict['finding']}; {verdict['remedy']}"
            )
    lines.append(f"\nTo look at the run: hf-vicreg report {shlex.quote(str(folder))}")
    lines.append(f"\nThe {'model' if is_dual else 'encoder'} is in {folder}. To load it:\n")
    name = python_string(folder)
    if is_dual:
        lines.append(f"{DUAL_IMPORTS}\n\nname = {name}\n{DUAL_LOCAL_CODE}")
    else:
        lines.append(LOCAL_SNIPPET.format(name=name, features=results["features"]))
    return "\n" + "\n".join(lines)
