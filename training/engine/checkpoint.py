"""Checkpoints that are complete or absent.

A checkpoint is written into a temporary folder, every file is flushed to disk, a manifest with sizes and hashes comes
last, and one rename makes it visible. Older ones are pruned only after that, and disappear by a rename, too. Loading
takes the newest one whose manifest holds. Tensors are safetensors, the rest is JSON: nothing is unpickled.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_vicreg.training.engine.average import AVERAGE_FILE, WeightAverage
from hf_vicreg.training.engine.step import RunState
from hf_vicreg.training.errors import InputError, room_in
from hf_vicreg.training.images.order import ORDERS, SHUFFLED
from hf_vicreg.training.launch.devices import accelerator_kind, restore_rng, rng_states
from hf_vicreg.training.launch.sharding import gathered, placed_like

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step_"
WRITING, REMOVING = ".writing_", ".removing_"  # before the name of a checkpoint that is not there yet, or no longer
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def copied(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    *,
    keep: bool = True,
) -> dict[str, dict[str, torch.Tensor]]:
    """Return whole copies of what a checkpoint holds, by file; training may go on, they are of this moment.

    Of weights that are shared out over the processes every one must call; those that do not `keep` get none.

    Args:
        model: The unwrapped model.
        optimizer: Its optimiser; tensors and numbers of its state are stored.
        average: Of the weights, if there is one.
        keep: Whether this process writes them.
    """
    held = {FILES[0]: _flat_model(model), FILES[1]: _flat_optimizer(optimizer)}
    if average is not None:
        held[AVERAGE_FILE] = average.tensors()
    return {name: gathered(tensors, keep=keep) for name, tensors in held.items()}


def checkpoint_writer(
    folder: Path,
    state: RunState,
    files: dict[str, dict[str, torch.Tensor]],
    rng_states: dict[str, torch.Tensor],
    keep: int,
    keep_every_steps: int | None = None,
) -> Callable[[], Path]:
    """Return what writes a checkpoint, prunes older ones and returns the checkpoint's folder; on one process.

    Args:
        folder: The run's `checkpoints` folder.
        state: Where the run stands, as of this call.
        files: Of `copied`.
        rng_states: Generator states of all processes, as `local_rng_states` names them.
        keep: How many checkpoints to keep, this one included.
        keep_every_steps: Checkpoints whose step is a multiple of it are kept for good, and not counted.

    Raises:
        InputError: By what is returned: the disk is full; older checkpoints are left as they were.
        OSError: By what is returned: it is not writable; the same holds.
    """
    states = {name: one.cpu() for name, one in rng_states.items()}
    told = json.dumps(asdict(state), indent=1)
    name = f"{PREFIX}{state.step:08d}"
    return partial(_write_whole, folder, name, files | {FILES[2]: states}, told, keep, keep_every_steps)


def _write_whole(
    folder: Path, name: str, files: dict[str, Any], state: str, keep: int, keep_every_steps: int | None
) -> Path:
    final, temporary = folder / name, folder / f"{WRITING}{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with room_in(folder):
            temporary.mkdir(parents=True)
            _write(temporary, files, state)
        if final.exists():  # left damaged by another hand, or written twice at one step
            _remove(final)
        temporary.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(final, keep, keep_every_steps)
    return final


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process had half written or half removed below a run's `checkpoints` folder."""
    for prefix in (WRITING, REMOVING):
        for path in folder.glob(f"{prefix}{PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def _write(folder: Path, files: dict[str, dict[str, torch.Tensor]], state: str) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "state.json").write_text(state)
    manifest = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _prune(newest: Path, keep: int, keep_every_steps: int | None) -> None:
    """Remove checkpoints beside the newest one."""
    # later steps than this one are left from before the run went back to an earlier checkpoint: they go first
    others = [path for path in list_checkpoints(newest.parent) if path != newest]
    later = [path for path in others if path.name > newest.name]
    earlier = [
        path
        for path in others
        if path.name < newest.name
        and not (keep_every_steps and int(path.name.removeprefix(PREFIX)) % keep_every_steps == 0)
    ]
    for old in later + earlier[: max(0, len(earlier) - (keep - 1))]:
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that it is whole or gone, whenever the process is killed."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def local_rng_states(rank: int) -> dict[str, torch.Tensor]:
    """Return torch's generator states of this process, as `rank.device`."""
    states = {f"{rank}.cpu": torch.get_rng_state()}
    if (kind := accelerator_kind()) is not None:
        states |= {f"{rank}.{kind}": state for state in rng_states(torch.device(kind))[1:]}
    return states


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of checkpoints below `folder`, oldest first, unverified."""
    named = (path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())
    return sorted(path for path in named if path.is_dir())


def find_checkpoint(folder: Path, name: str) -> Path | None:
    """Return the checkpoint to resume from, or None if `latest` finds none.

    Damaged checkpoints are named in the log and passed over.

    Args:
        folder: The run's `checkpoints` folder.
        name: `latest`, or the name or path of one checkpoint.

    Raises:
        InputError: The named checkpoint is missing or damaged, or every one is damaged.
    """
    if name != "latest":
        path = next((one for one in (folder / name, Path(name)) if one.is_dir()), None)
        if path is None:
            raise InputError(f"`resume_from_checkpoint`: expected 'latest' or a folder in {folder}, got {name!r}.")
        damage = find_damage(path)
        if damage:
            raise InputError(f"`resume_from_checkpoint`: {path} is damaged: {damage}; use 'latest'.")
        return path
    candidates = list_checkpoints(folder)
    for path in reversed(candidates):
        damage = find_damage(path)
        if not damage:
            return path
        logger.warning("checkpoint %s is damaged and passed over: %s", path.name, damage)
    if candidates:
        raise InputError(f"`resume_from_checkpoint`: every checkpoint in {folder} is damaged; start in a new folder.")
    return None


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict) or not manifest.keys() >= set(FILES):
        return f"{MANIFEST} does not name all files"
    for name, expected in manifest.items():
        if Path(name).name != name or (path / name).is_symlink():
            return f"{MANIFEST} names a file that lies elsewhere"
        if not (path / name).is_file():
            return f"{name} is missing"
        if _describe(path / name) != expected:
            return f"{name} is not what was written"
    return None


def load_state(path: Path) -> RunState:
    """Return where the run stood.

    Raises:
        InputError: A version of the package with other fields wrote it.
    """
    try:
        # before it was written down, there was one order
        state = RunState(**{"order": SHUFFLED} | json.loads((path / "state.json").read_text()))
        expected = {key: type(one) for key, one in asdict(RunState()).items()}
        wrong = [key for key, kind in expected.items() if not _is(getattr(state, key), kind)]
        if wrong or state.step < 0 or not all(_is(one, int) for one in state.unusable):
            raise TypeError(f"`{(wrong or ['step or unusable'])[0]}` holds something else")
        if state.order not in ORDERS:
            raise ValueError(f"its order of images is {state.order!r}, unknown here")
        return state
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"`resume_from_checkpoint`: {path} was written by another version of this package ({error}); "
            "resume with that version or start in a new folder."
        ) from error


def _is(value: Any, kind: type) -> bool:
    """Return whether a value is of a kind; whole numbers are numbers, and true is none."""
    return isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def load_tensors(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Load weights, optimiser and this process's generator state, in place.

    A process that the checkpoint has no generator state for (there are more processes now) keeps its own.
    """
    own = model.state_dict()
    found = load_file(path / "model.safetensors")
    placed = {name: placed_like(one, own[name]) if name in own else one for name, one in found.items()}
    model.load_state_dict(placed, strict=True)
    _load_flat_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    states = load_file(path / "rng.safetensors")
    kind = accelerator_kind()
    own_states = [states[name] for name in (f"{rank}.cpu", f"{rank}.{kind}") if name in states]
    if own_states:
        restore_rng(own_states, torch.device(kind or "cpu"))


def _flat_model(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name; those with several names once for each."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Tensors of the optimiser's state as `index.name`; groups are rebuilt from the configuration."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def _load_flat_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, torch.Tensor]) -> None:
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    held = [one for group in optimizer.param_groups for one in group["params"]]
    for place, parameter in enumerate(held):
        own = entries.get(place, {})
        own.update({key: placed_like(one, parameter) for key, one in own.items() if one.shape == parameter.shape})
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
