"""What a run's folder says of the run: read from inside it alone, checked, without the places of a machine."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.card import OF_THE_OWNER
from hf_vicreg.model_cards.escaping import one_line, without_paths
from hf_vicreg.model_cards.schema import FileError, check_recipe, check_results, read_checked
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.monitor.curves import with_ends
from hf_vicreg.training.monitor.diagnosis import MIN_LINES, Record
from hf_vicreg.training.monitor.doctor import health_of, read_run
from hf_vicreg.training.run.run_folder import file_inside

FILES = ("recipe.yaml", "log.jsonl", "results.json")


@dataclass(frozen=True)
class RunFacts:
    """A run, told from its files.

    Attributes:
        folder: Of the run.
        records: Lines of its log, between the accuracies before and after training where they were measured.
        results: What `results.json` holds; empty for a run that is not finished.
        recipe: Its settings, without where its images and it itself lie.
        dataset: Name of the built-in data set it was trained on, or None: others are not looked for.
        verdicts: What the doctor found, as `health_of` gives it.
        parts: Names of the parts of its loss.
        mark: What tells it from another run of the same name.
    """

    folder: Path
    records: list[Record]
    results: dict[str, Any]
    recipe: dict[str, Any]
    dataset: str | None
    verdicts: list[dict[str, Any]]
    parts: tuple[str, ...]
    mark: str = ""

    @property
    def name(self) -> str:
        """The folder's name."""
        return one_line(self.folder.resolve().name) + self.mark

    @property
    def steps(self) -> list[Record]:
        """The lines of training steps."""
        return [record for record in self.records if "loss" in record]

    @property
    def is_healthy(self) -> bool:
        """Whether the last line shows nothing wrong."""
        return not any(verdict["present"] for verdict in self.verdicts)

    @property
    def verdict(self) -> str:
        """The doctor's verdict in one sentence."""
        step = self.steps[-1]["step"]
        present = [verdict for verdict in self.verdicts if verdict["present"]]
        if present:
            told = "; ".join(f"{one['name']}: {one['finding']}, so {one['remedy']}" for one in present)
            return f"At step {step:,}, {told}."
        if len(self.steps) < MIN_LINES:
            return f"Nothing wrong so far at step {step:,}, but the log is too short to tell more."
        passed = ", ".join(verdict["name"] for verdict in self.verdicts)
        return f"Healthy: nothing wrong at step {step:,}{f'; passed on the way: {passed}' if passed else ''}."

    @property
    def levels(self) -> dict[str, float]:
        """What the accuracies are compared with: those of raw pixels."""
        found = (self.results.get("knn_accuracy") or {}).get("raw_pixels")
        return {} if found is None else {"k-NN of raw pixels": found}

    def figures(self) -> list[tuple[str, str]]:
        """Return the figures that stand at the top, each with its name; what was not measured is left out."""
        found: list[tuple[str, str]] = []
        knn, last = self.results.get("knn_accuracy") or {}, self.steps[-1]
        measured = [record["knn_accuracy"] for record in self.records if "knn_accuracy" in record]
        accuracy = knn.get("trained", measured[-1] if measured else None)
        begun = f"k-NN, {'what it began with' if self.recipe.get('model_name_or_path') else 'untrained'}"
        if accuracy is not None:
            found.append((f"{self.results.get('knn_neighbours', 'k')}-NN accuracy", f"{accuracy:.3f}"))
        found += [
            (name, f"{knn[key]:.3f}")
            for key, name in (("untrained", begun), ("raw_pixels", "k-NN, raw pixels"))
            if key in knn
        ]
        planned = self.results.get("planned_steps")
        of = f" of {planned:,}" if planned not in (None, last["step"]) else ""
        found.append(("steps", f"{last['step']:,}{of}"))
        if math.isfinite(last["loss"]):
            found.append(("loss", f"{last['loss']:.3g}"))
        speeds = [one for record in self.steps if math.isfinite(one := record.get("images_per_second", math.nan))]
        if speeds:
            found.append(("images/s, median", f"{statistics.median(speeds):,.0f}"))
        if self.results.get("training_seconds") is not None:
            found.append(("training time", duration(self.results["training_seconds"])))
        return found


def read_facts(folder: Path) -> RunFacts:
    """Return what a run's folder says; nothing outside it is read, whatever its links and recipe name.

    Raises:
        InputError: Not a run's folder, no step in its log yet, or a file that is not what it has to be.
    """
    for name in FILES:
        file_inside(folder, name)
    records, gamma, objective = read_run(folder)
    try:
        recipe = read_checked(folder / "recipe.yaml", check_recipe)
        results = read_checked(folder / "results.json", check_results) if (folder / "results.json").exists() else {}
    except FileError as error:
        raise InputError(f"`RUN`: {error}") from None
    results = without_paths(results)
    return RunFacts(
        folder=folder,
        records=with_ends(records, results),
        results=results,
        recipe=without_paths({key: value for key, value in recipe.items() if key not in OF_THE_OWNER}),
        dataset="digits" if recipe.get("dataset_name") == "digits" and not recipe.get("train_dir") else None,
        verdicts=health_of(records, gamma, objective)["verdicts"],
        parts=objective.parts,
    )


def duration(seconds: float) -> str:
    """Return a time as people say it: `45 s`, `7 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
