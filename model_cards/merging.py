"""A card that people have edited, with its generated sections brought up to date around their words."""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_vicreg.model_cards.escaping import prose
from hf_vicreg.model_cards.results import OWN_TASKS

SECTIONS = ("about", "loading", "results", "training", "attention", "limits", "citation")
BEGIN = "<!-- hf_vicreg:{} generated: text up to the next such line is replaced when publishing again -->"
END = "<!-- /hf_vicreg:{} -->"
# of the metadata, what publishing again brings up to date; the rest is whoever edited it last
GENERATED_KEYS = ("library_name", "pipeline_tag")
# tags that a card is given beside its model's type; one that is generated no more is taken away
OBJECTIVES = ("vicreg", "vicregl", "simclr", "barlow_twins", "sigreg", "byol", "mae", "simmim")
GENERATED_TAGS = (*OBJECTIVES, "sparse-attention", "self-supervised-learning", "vicreg_dual_encoder")
GENERATED_METRICS = ("accuracy",)


def merged_card(existing: str, generated: str) -> str:
    """Return a card that people may have edited with its generated parts brought up to date.

    A section that lies between its two comment lines is replaced; one whose lines were taken out stays out. A card
    without a single such line is kept whole, and all sections follow it. In the metadata, what was generated is
    replaced, a license that is given too; tags, data sets, metrics, results and a base model of people's own stay.
    """
    old, new = ModelCard(existing, ignore_metadata_errors=True), ModelCard(generated)
    sections = dict(_sections(new.text))
    body, marked = old.text.strip("\n"), [name for name, _ in _sections(old.text)]
    for name in marked:
        found = _section(name).search(body)
        if found:
            body = body[: found.start()] + sections[name] + body[found.end() :]
    if not marked:
        body = "\n\n".join([body, *new.text.strip("\n").split("\n\n", 1)[1:]])
    front_matter = _merged_metadata(
        old.data.to_dict(), new.data.to_dict(), "\n".join(dict(_sections(old.text)).values())
    )
    front = yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{front}\n---\n\n{body}\n"


def _merged_metadata(before: dict[str, Any], after: dict[str, Any], sections: str) -> dict[str, Any]:
    """Return the metadata of two cards; the former's generated `sections` tell what of it was generated as well."""
    stated = set(re.findall(r"`([^`\n]+)`", sections))
    replaced = {*GENERATED_KEYS, *({"license"} & after.keys())}
    base = str(before.get("base_model"))
    if base in stated or f"| pretrained encoder | {prose(base)} |" in sections:  # else people have named it
        replaced |= {"base_model", "base_model_relation"}
    kept = {key: value for key, value in before.items() if key not in replaced}
    merged = after | kept
    if "base_model" in kept and "base_model_relation" not in kept:
        merged.pop("base_model_relation", None)
    model_type = re.findall(r"^A `([^`\n]+)`", sections, re.MULTILINE)
    ours = {
        "tags": {*GENERATED_TAGS, *model_type} if sections else set(),
        "datasets": stated,
        "metrics": set(GENERATED_METRICS),
    }
    for key, generated in ours.items():
        own = [one for one in _listed(before.get(key)) if one not in generated]
        merged[key] = list(dict.fromkeys([*own, *_listed(after.get(key))]))
    merged["model-index"] = _merged_results(before.get("model-index") or [], after.get("model-index") or [])
    return {key: value for key, value in merged.items() if value not in (None, [])}


def _merged_results(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of two cards' metadata, of the former those of tasks that are none of ours."""
    others = [
        result
        for model in before
        for result in model.get("results") or []
        if (result.get("task") or {}).get("name") not in OWN_TASKS
    ]
    if not others:
        return after
    model = (after or before)[0]
    return [model | {"results": [*others, *(after[0]["results"] if after else [])]}]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _section(name: str) -> re.Pattern:
    begin = re.escape(BEGIN.format(name).split(" generated")[0])
    return re.compile(rf"^{begin} .*?^{re.escape(END.format(name))}$", re.MULTILINE | re.DOTALL)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for name in SECTIONS:
        found = _section(name).search(text)
        if found:
            yield name, found[0]
