"""What a run passed over, each image with its reason: `unusable.jsonl` in the run's folder, and lines for the log."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.escaping import one_line  # names of files are somebody else's text
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.streaming import ImageStream

logger = logging.getLogger(__name__)

UNUSABLE_FILE = "unusable.jsonl"
NUM_NAMED = 5  # of each kind, in the log


def write_unusable(
    folder: Path,
    source: ImageSource | ImageStream,
    indices: Iterable[int],
    outcome: str = "were not usable and replaced by others",
) -> None:
    """Write why images could not be used into the run's folder, and say it in the log.

    Reasons are found by reading the images once more: a checkpoint holds indices alone, so the file is as complete
    after a resumed run. Written aside, flushed and renamed. Without indices nothing is written. One process calls it.

    Args:
        folder: The run's `output_dir`.
        source: The images.
        indices: Those that could not be used.
        outcome: What became of them, for the log.

    Raises:
        OSError: No room.
    """
    entries = [_entry(source, index) for index in sorted(indices)]
    if not entries:
        return
    temporary = folder / f".writing_{UNUSABLE_FILE}"
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / UNUSABLE_FILE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    logger.warning("%d image(s) %s; %s names them all:", len(entries), outcome, UNUSABLE_FILE)
    for line in grouped_lines(entries):
        logger.warning("  %s", line)


def none_readable(source: ImageSource) -> str:
    """Return the end of a sentence on a source without a readable image: their number, and what is wrong with one."""
    reason = one_line(f"{source.describe(0)}: {source.why(0) or 'could not be read'}")
    return f"none of {len(source):,} can be read; {reason}"


def too_few(source: ImageSource, usable: int, least: int) -> str:
    """Return a sentence on a source of too few images that can be used, with what is wrong with the first other."""
    wrong = ((index, source.why(index)) for index in range(len(source)))
    index, reason = next((one for one in wrong if one[1]), (0, None))
    remedy = "give more" if reason is None else f"of the others, {one_line(f'{source.describe(index)}: {reason}')}"
    return f"expected at least {least} usable images, found {usable} of {len(source):,} in {source.name}; {remedy}"


def grouped_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Return a line for each kind of reason, the most frequent first, with the first images it holds for."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault(entry["kind"], []).append(entry)
    lines = []
    for kind, group in sorted(kinds.items(), key=lambda item: -len(item[1])):
        named = "; ".join(one_line(f"{entry['name']}: {entry['reason']}") for entry in group[:NUM_NAMED])
        lines.append(f"{len(group):,} {kind}: {named}" + ("; ..." if len(group) > NUM_NAMED else ""))
    return lines


def _entry(source: ImageSource | ImageStream, index: int) -> dict[str, Any]:
    refusal = source.refusal(index)
    kind = "unknown" if refusal is None else refusal.kind
    reason = "could not be used during the run, can be read now" if refusal is None else str(refusal)
    return {"index": index, "name": source.describe(index), "kind": kind, "reason": reason}
