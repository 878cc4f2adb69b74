"""What is wrong with a run, told from the lines of its log alone, in plain words and with the remedy.

The rules compare what the figures mean, not what one recipe gives. Gamma is the target of the standard deviation, D
the dimensions of the embeddings, N the images of the global batch.

- **embedding collapse**: the embeddings' mean standard deviation is below a tenth of gamma and not rising. Images
  differ by less than a tenth of what the loss asks for, and nothing brings the rest back.
- **encoder collapse**: of the encoder's pooled output less than 2% (root mean square) differs between images, and
  that share is not rising. bfloat16 rounds by 0.4%: little more than rounding is left to tell images apart. Batch
  norm in the expander can blow it up to any spread, so the embeddings need not show it.
- **dimensional collapse**: the embeddings' effective rank is below 2 and not rising. Two directions with the same
  variance would give 2: nearly all of it lies in one, whatever D.
- **narrow features**: with the learning rate at half its peak or less, the effective rank of the encoder's pooled
  output is below 1.25 and not rising: nine tenths of the variance lie in one direction, most often brightness.
- **exploding variance**: the mean standard deviation is above twice gamma and not falling. The loss rewards no more
  than gamma.
- **batch too small**: the covariance's noise floor (D - 1) / (N - 1) is above 16 and the mean standard deviation
  stays below 0.6 gamma. At a common deviation s the noise alone costs (D - 1) / (N - 1) s^4 for each view, and the
  paper's hinge pays 12.5 (gamma - s) for it: from a floor of 16 on, s settles below 0.6 even if no dimension is
  correlated.
- **learning rate too high**: three steps in ten lines were skipped because loss or gradient was not finite; or the
  loss is 5% above that of the first line; or in one of the ten lines it was a quarter above the lowest of those before
  (in a line without embedding collapse: what that leaves of the loss wavers); or in three of them a gradient was ten
  times as large as usual. Most of the loss is the hinge, and from batch to batch it moves by a few percent. A learning
  rate far too high may have spoiled the first line already; the loss then falls from there, but not without jumps. The
  error of a reconstruction moves with what a batch shows: jumps say nothing, three times the first line's loss does.
- **not sure**: the mean standard deviation is below 0.3 gamma, the effective rank below 3, and neither is rising. The
  run is stuck short of a collapse. Most often a learning rate far too high broke the encoder before the first line
  that would show it; a small batch or a strong invariance can do the same, so this says what to try first.
- **loader-bound**: more than half of the time is spent waiting for images.

"Rising": the mean of the last three lines is 1% above every one of the seven before and above the first of all;
"falling" likewise. Nothing but skipped steps is judged from fewer than six lines, and spreads not during the warm-up.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from hf_vicreg.training.objectives.entry import ObjectiveEntry
from hf_vicreg.training.objectives.vicreg import VICREG

Record = dict[str, Any]

RECENT = 3  # lines that are averaged
WINDOW = 10  # lines that a trend, skipped steps, spikes and waiting are looked for in
MIN_LINES = 6
NOTABLE = 0.01  # relative change that is one
COLLAPSED_STD = 0.1  # of gamma
EXPLODED_STD = 2.0  # of gamma
HELD_STD = 0.6  # of gamma
COLLAPSED_SPREAD = 0.02
COLLAPSED_RANK = 2.0
NARROW_RANK = 1.25
STUCK_STD = 0.3  # of gamma
STUCK_RANK = 3.0
HIGH_FLOOR = 16.0
ABOVE_START, FAR_ABOVE_START = 1.05, 3.0
JUMP = 1.25
SPIKE = 10.0  # times the median
NUM_EVENTS = 3  # skipped steps, or lines with a spike
MOSTLY = 0.5


@dataclass(frozen=True)
class Verdict:
    """One thing that is wrong.

    Attributes:
        name: What, in a word or two, the same for every run.
        finding: What the log shows, with its figures.
        remedy: What to do.
        step: Of the line that shows it, or showed it first.
    """

    name: str
    finding: str
    remedy: str
    step: int

    def __str__(self) -> str:
        return f"{self.name}: {self.finding}; {self.remedy}"


def diagnose(
    records: Sequence[Record], gamma: float = 1.0, objective: ObjectiveEntry = VICREG, peak: float = 0.0
) -> list[Verdict]:
    """Return what is wrong at the last line of a log; nothing if all is well.

    Args:
        records: Lines of log.jsonl, oldest first; those without a loss are passed over. The first line and the last
            `WINDOW` + 1 are looked at. A figure that is missing or not finite is no evidence.
        gamma: Target of the embeddings' standard deviation.
        objective: What is learned: some rules mean nothing for it, some remedies are its own.
        peak: The largest learning rate of lines that are not among the records.
    """
    lines = [record for record in records if "loss" in record]
    learning_rate = partial(_learning_rate_too_high, objective=objective)
    rules: list[Callable[[list[Record], float], Verdict | None]] = [learning_rate, _loader_bound]
    if len(lines) >= MIN_LINES and not _value(lines[-1], "learning_rate") > _value(lines[-2], "learning_rate"):
        rules = [*SPREAD_RULES, *rules]
        if _value(lines[-1], "learning_rate") <= max(peak, *(_value(line, "learning_rate") for line in lines)) / 2:
            rules.insert(0, _narrow_features)
    found = [rule(lines, gamma) for rule in rules] if lines else []
    return [
        replace(verdict, remedy=objective.remedy_for(verdict.name, verdict.remedy))
        for verdict in found
        if verdict is not None and verdict.name not in objective.silent
    ]


class Watch:
    """Follows a log line by line and tells each thing once.

    Attributes:
        present: What is wrong at the last line, by name, with its first step.
        past: What was wrong at some line, by name, as it was first seen.
    """

    def __init__(self, gamma: float = 1.0, objective: ObjectiveEntry = VICREG):
        self.gamma, self.objective = gamma, objective
        self.lines: list[Record] = []
        self.peak = 0.0
        self.present: dict[str, Verdict] = {}
        self.past: dict[str, Verdict] = {}

    def follow(self, record: Record) -> list[Verdict]:
        """Read the next line, and return what is wrong there and was at none before."""
        if "loss" not in record:
            return []
        self.lines = [*self.lines[:1], *self.lines[1:][-WINDOW:], record]
        self.peak = max(self.peak, _value(record, "learning_rate"))
        now = diagnose(self.lines, self.gamma, self.objective, self.peak)
        new = [verdict for verdict in now if verdict.name not in self.past]
        self.past |= {verdict.name: verdict for verdict in new}
        self.present = {verdict.name: replace(verdict, step=self.past[verdict.name].step) for verdict in now}
        return new


def _embedding_collapse(lines: list[Record], gamma: float) -> Verdict | None:
    std = _trend(lines, "embedding_std_mean")
    if std.rising or not std.recent < COLLAPSED_STD * gamma:
        return None
    return Verdict(
        "embedding collapse",
        f"the embeddings' mean standard deviation is {std.recent:.2g}, of a target of {gamma:g}, and does not rise",
        "raise vicreg.variance_weight to at least vicreg.invariance_weight, or lower learning_rate",
        lines[-1]["step"],
    )


def _encoder_collapse(lines: list[Record], gamma: float) -> Verdict | None:
    for prefix, whose in (("", "the encoder's"), ("second_", "the second encoder's")):
        spread = _trend(lines, f"{prefix}encoder_spread")
        if spread.recent < COLLAPSED_SPREAD and not spread.rising:
            return Verdict(
                "encoder collapse",
                f"only {spread.recent:.2%} of {whose} output differs between images, and that does not rise",
                "check that the images differ and that views.crop_min_ratio leaves enough of them, or lower "
                "learning_rate and weight_decay",
                lines[-1]["step"],
            )
    return None


def _dimensional_collapse(lines: list[Record], gamma: float) -> Verdict | None:
    rank = _trend(lines, "embedding_rank")
    if rank.rising or not rank.recent < COLLAPSED_RANK:
        return None
    return Verdict(
        "dimensional collapse",
        f"the embeddings' effective rank is {rank.recent:.2f}: nearly all their variance lies in one direction",
        "raise vicreg.covariance_weight, or lower learning_rate",
        lines[-1]["step"],
    )


def _narrow_features(lines: list[Record], gamma: float) -> Verdict | None:
    for prefix, whose in (("", "the encoder's"), ("second_", "the second encoder's")):
        rank = _trend(lines, f"{prefix}encoder_rank")
        if rank.recent < NARROW_RANK and not rank.rising:
            return Verdict(
                "narrow features",
                f"the effective rank of {whose} features is {rank.recent:.2f} and does not rise: images differ along "
                "one direction, most often brightness",
                "train longer, or with smaller patches, smaller crops and a stronger views.brightness or views.gain",
                lines[-1]["step"],
            )
    return None


def _exploding_variance(lines: list[Record], gamma: float) -> Verdict | None:
    std = _trend(lines, "embedding_std_mean")
    if std.falling or not std.recent > EXPLODED_STD * gamma:
        return None
    return Verdict(
        "exploding variance",
        f"the embeddings' mean standard deviation is {std.recent:.3g}, of a target of {gamma:g}, and does not fall",
        "lower learning_rate, set max_grad_norm, and keep vicreg.covariance_weight above 0",
        lines[-1]["step"],
    )


def _batch_too_small(lines: list[Record], gamma: float) -> Verdict | None:
    floor, std = _value(lines[-1], "covariance_floor"), _trend(lines, "embedding_std_mean")
    if not (floor > HIGH_FLOOR and std.recent < HELD_STD * gamma):
        return None
    return Verdict(
        "batch too small",
        f"(D - 1) / (N - 1), the covariance that independent dimensions would show, is {floor:.0f}, and that noise "
        f"holds the embeddings' standard deviation at {std.recent:.2g}, of a target of {gamma:g}",
        f"raise batch_size or narrow the last of vicreg.expander_sizes, by {floor / HIGH_FLOOR:.1f} times or more",
        lines[-1]["step"],
    )


def _stuck(lines: list[Record], gamma: float) -> Verdict | None:
    std, rank = _trend(lines, "embedding_std_mean"), _trend(lines, "embedding_rank")
    stuck = COLLAPSED_STD * gamma <= std.recent < STUCK_STD * gamma and COLLAPSED_RANK <= rank.recent < STUCK_RANK
    if not stuck or std.rising or rank.rising or _value(lines[-1], "covariance_floor") > HIGH_FLOOR:
        return None
    return Verdict(
        "not sure",
        f"the embeddings' mean standard deviation is {std.recent:.2g}, of a target of {gamma:g}, their effective rank "
        f"{rank.recent:.1f}, and neither rises",
        "probably learning_rate is too high: lower it by three times; if that does not help, raise batch_size or "
        "vicreg.variance_weight",
        lines[-1]["step"],
    )


SPREAD_RULES = [_embedding_collapse, _encoder_collapse, _dimensional_collapse, _exploding_variance]
SPREAD_RULES += [_batch_too_small, _stuck]


def _learning_rate_too_high(lines: list[Record], gamma: float, *, objective: ObjectiveEntry) -> Verdict | None:
    recent, falls, wavers = lines[-WINDOW:], objective.loss_falls, objective.loss_wavers
    earlier = lines[-WINDOW - 1] if len(lines) > WINDOW else {"skipped_steps": 0}
    skipped = _value(lines[-1], "skipped_steps") - _value(earlier, "skipped_steps")
    start, now = _value(lines[0], "loss"), _mean(lines[-MIN_LINES:], "loss")
    lowest = accumulate((_value(line, "loss") for line in recent), min)
    jumps = [
        (low, line["loss"])
        for low, line in zip(lowest, recent, strict=True)
        if _value(line, "loss") > JUMP * low and _value(line, "embedding_std_mean") >= COLLAPSED_STD * gamma
    ]
    norms = [_value(line, "grad_norm_max") for line in recent]
    usual = statistics.median([norm for norm in norms if norm > 0] or [math.inf])  # 0: the expander alone warms up
    spikes = sum(norm > SPIKE * usual for norm in norms)
    if skipped >= NUM_EVENTS:
        finding = f"loss or gradient was not finite in {skipped:.0f} steps of the last {len(recent)} lines"
    elif falls and len(lines) >= MIN_LINES and now > (FAR_ABOVE_START if wavers else ABOVE_START) * start:
        finding = f"the loss is {now:.3g} and was {start:.3g} at the first line"
    elif falls and not wavers and len(lines) >= MIN_LINES and jumps:
        finding = "the loss jumped from {:.3g} to {:.3g}".format(*jumps[-1])
    elif spikes >= NUM_EVENTS:
        finding = f"{spikes} of {len(recent)} lines have a gradient over {SPIKE:g} times the usual {usual:.2g}"
    else:
        return None
    remedy = "lower learning_rate by three times or more, or raise warmup_ratio"
    return Verdict("learning rate too high", finding, remedy, lines[-1]["step"])


def _loader_bound(lines: list[Record], gamma: float) -> Verdict | None:
    recent = lines[1:][-WINDOW:]  # the first line has the start of the loader's processes in it
    waited = _mean(recent, "data_wait_ratio")
    if len(recent) < MIN_LINES or not waited > MOSTLY:
        return None
    return Verdict(
        "loader-bound",
        f"{waited:.0%} of the time is spent waiting for images",
        "raise dataloader_num_workers, or store the images smaller",
        lines[-1]["step"],
    )


class _Trend(NamedTuple):
    recent: float  # mean of the last lines
    rising: bool
    falling: bool


def _trend(lines: list[Record], key: str) -> _Trend:
    recent, before = _mean(lines[-RECENT:], key), [_value(line, key) for line in lines[-WINDOW:-RECENT]]
    start = _value(lines[0], key)
    return _Trend(recent, recent > (1 + NOTABLE) * max(*before, start), recent < (1 - NOTABLE) * min(*before, start))


def _mean(lines: Sequence[Record], key: str) -> float:
    return statistics.fmean(_value(line, key) for line in lines) if lines else float("nan")


def _value(line: Record, key: str) -> float:
    """Return a figure of a line; NaN, which no comparison holds for, where it has none."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) else float("nan")
