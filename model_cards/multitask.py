"""What only the card of an encoder has that was fine-tuned for several tasks at once."""

from collections.abc import Iterator
from typing import Any

from hf_vicreg.model_cards.escaping import code, prose
from hf_vicreg.model_cards.results import MISSING, count, figure

MULTITASK = "finetune_multitask"
HEADS_NOTE = (
    "The heads of the tasks are not in this repository: each is a whole model, in a folder of its own beside the "
    "encoder where it was trained."
)


def multitask_record(results: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of `results.json` of a fine-tuning for several tasks; empty if there is none."""
    found = [one for one in results.get("evaluations") or [] if one.get("task") == MULTITASK]
    return found[-1] if found else {}


def tasks_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what an entry says of its tasks, by their names."""
    tasks = (record.get("details") or {}).get("tasks")
    return {name: one for name, one in tasks.items() if isinstance(one, dict)} if isinstance(tasks, dict) else {}


def about_tasks(record: dict[str, Any], model_type: str) -> str:
    """Return what the model is."""
    listed = ", ".join(f"{code(name)} ({prose(str(one.get('kind')))})" for name, one in tasks_of(record).items())
    size = count(record.get("model") or {}, "parameters")
    return (
        f"A {code(model_type)} encoder, fine-tuned for several tasks at once: {listed or MISSING}. Parameters: {size}."
    )


def tasks_table(record: dict[str, Any]) -> Iterator[str]:
    """Yield lines of the table of what was trained."""
    details, machine = record.get("details") or {}, record.get("environment") or {}
    yield "| | |\n| --- | --- |"
    yield f"| pretrained encoder | {prose(details.get('pretrained_model') or MISSING)} |"
    yield f"| steps | {count(details, 'steps')} |"
    yield f"| hardware | {prose(machine.get('hardware') or MISSING)} |"
    yield f"| time | {figure(details, 'training_seconds', '.1f', ' s')} |"
    yield "\n| task | kind | data | images a step | weight of its loss at the end |"
    yield "| --- | --- | --- | --- | --- |"
    for name, one in tasks_of(record).items():
        share, weight = (one.get(key) for key in ("images_a_step", "loss_weight"))
        yield (
            f"| {code(name)} | {prose(str(one.get('kind')))} | {code(str(one.get('dataset_name')))} | "
            f"{share if isinstance(share, int) else MISSING} | "
            f"{format(weight, '.3g') if isinstance(weight, int | float) else MISSING} |"
        )
