"""`TASKS.yaml`: which encoder, and which tasks it is trained for. Imports nothing heavy."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_vicreg.training.errors import InputError, RelayedError, hint
from hf_vicreg.training.run.settings import typed
from hf_vicreg.training.tasks.arguments import (
    CaptioningArguments,
    DetectionArguments,
    LabelArguments,
    MultitaskArguments,
    RunArguments,
    SegmentationArguments,
    TaskArguments,
    check_task,
)

CLASSES, SEVERAL, NUMBERS = "classification", "multi_label_classification", "regression"
KINDS: dict[str, type[TaskArguments]] = {
    CLASSES: LabelArguments,
    SEVERAL: LabelArguments,
    NUMBERS: LabelArguments,
    "detection": DetectionArguments,
    "segmentation": SegmentationArguments,
    "captioning": CaptioningArguments,
}
OF_THE_RUN = {one.name for one in dataclasses.fields(RunArguments)}
NOT_SHARED = ("lora_rank", "from_scratch")  # they change the encoder, which is everybody's
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
MAX_BYTES = 2**20


@dataclass(frozen=True)
class Task:
    """One entry of the file.

    Attributes:
        name: Of its folder and its figures.
        kind: One of `KINDS`.
        arguments: What is said of it, and what the run's flags say of all.
        weight: Of its loss, where weights are fixed.
    """

    name: str
    kind: str
    arguments: TaskArguments
    weight: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from others, plain."""
        own = {key: one for key, one in vars(self.arguments).items() if key not in (*OF_THE_RUN, *NOT_SHARED)}
        return {"kind": self.kind, "weight": self.weight} | own


def read_tasks(path: str, run: MultitaskArguments) -> tuple[str, list[Task]]:
    """Return the encoder's folder or Hub id and the tasks of a file, checked as far as their data need not be read.

    Args:
        path: The file.
        run: The flags.

    Raises:
        InputError: No such file, no YAML, an unknown key or kind, two tasks of one name, or a value out of range.
    """
    content = _read(path)
    for key in content:
        if key not in ("model", "tasks"):
            raise InputError(f"`{key}`: unknown key in {path}{hint(key, ['model', 'tasks'])}")
    model, entries = content.get("model"), content.get("tasks")
    if not isinstance(model, str) or not model:
        raise InputError(f"`model`: expected the folder or Hub id of an encoder in {path}, got {model!r}.")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"`tasks`: expected a list of tasks in {path}, got {_short(entries)}.")
    tasks: list[Task] = []
    for place, entry in enumerate(entries):
        task = _task(entry, place, path, run)
        if any(task.name == other.name for other in tasks):
            raise InputError(
                f"`tasks`: expected names that differ in {path}, got two tasks {task.name!r}; rename one."
            )
        tasks.append(task)
    names = [task.name for task in tasks]
    if run.only is not None and run.only not in names:
        raise InputError(f"`only`: expected one of the tasks {', '.join(names)}, got {run.only!r}.")
    return model, tasks


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"`TASKS`: expected a YAML file, got {path!r}, which is none; write one with `model`, `tasks`."
        )
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"`TASKS`: expected at most {MAX_BYTES:,} bytes, {path} has more.")
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_OneOfEach)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`TASKS`: {path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise InputError(f"`TASKS`: expected a mapping with `model` and `tasks` in {path}, got {_short(content)}.")
    return content


class _OneOfEach(yaml.SafeLoader):
    """A loader that refuses a key that is there twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`."""
        merged = "tag:yaml.org,2002:merge"  # of other mappings, whose keys give way
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merged]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _task(entry: Any, place: int, path: str, run: MultitaskArguments) -> Task:
    if not isinstance(entry, dict):
        raise InputError(
            f"`tasks[{place}]`: expected a mapping with `name` and `kind` in {path}, got {_short(entry)}."
        )
    entry = dict(entry)
    name, kind, weight = (entry.pop(key, None) for key in ("name", "kind", "weight"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"`tasks[{place}].name`: expected small letters, digits and _, a letter first, got {_short(name)}."
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"`{name}.kind`: expected one of {', '.join(KINDS)}, got {_short(kind)}{hint(kind, list(KINDS))}"
        )
    if weight is not None and run.weighting != "fixed":
        raise InputError(
            f"`{name}.weight`: expected none with learned weights, got {_short(weight)}; give --weighting fixed."
        )
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise InputError(f"`{name}.weight`: expected a number above 0, got {_short(weight)}.")
    known = [one.name for one in dataclasses.fields(KINDS[kind]) if one.name not in (*OF_THE_RUN, *NOT_SHARED)]
    for key in entry:
        if key in OF_THE_RUN:
            raise InputError(f"`{name}.{key}`: expected once for all tasks, got one in {path}; give --{key}.")
        if key not in known:
            raise InputError(f"`{name}.{key}`: unknown key of {kind} in {path}{hint(str(key), known)}")
    shared = {key: value for key, value in vars(run).items() if key in OF_THE_RUN}
    arguments = KINDS[kind](**shared, **typed(KINDS[kind], entry, f"{name}."))
    with of_task(name):
        check_task(arguments)
    return Task(name, kind, arguments, float(weight))


@contextmanager
def of_task(name: str) -> Iterator[None]:
    """Name the task before the field in what is said of bad input; the encoder and the folder are nobody's own."""
    try:
        yield
    except RelayedError:
        raise
    except InputError as error:
        field, said = str(error)[1:].partition("`")[0], str(error)
        if said.startswith("`") and field not in (*OF_THE_RUN, "MODEL"):
            said = f"`{name}.{said[1:]}"
        raise InputError(said.replace("`MODEL`", "`model`", 1)) from error


def _short(value: Any) -> str:
    return repr(value)[:60]
