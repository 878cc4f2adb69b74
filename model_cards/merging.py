"""A card that people have edited, with its generated sections brought up to date around their words."""

import re
from collections.abc import Iterator

import yaml
from huggingface_hub import ModelCard

SECTIONS = ("about", "loading", "results", "training", "attention", "limits", "citation")
BEGIN = "<!-- hf_vicreg:{} generated: text up to the next such line is replaced when publishing again -->"
END = "<!-- /hf_vicreg:{} -->"
# of the metadata, what publishing again brings up to date; the rest is whoever edited it last
GENERATED_KEYS = ("library_name", "pipeline_tag", "datasets", "metrics", "model-index")
GENERATED_TAGS = ("sparse-attention",)  # of the tags; one that is generated no more is taken away


def merged_card(existing: str, generated: str) -> str:
    """Return a card that people may have edited with its generated parts brought up to date.

    A section that lies between its two comment lines is replaced; one whose lines were taken out stays out. A card
    without a single such line is kept whole, and all sections follow it. In the metadata, what is generated is
    replaced, a license that is given too, tags are added to, and anything else stays.
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
    before, after = old.data.to_dict(), new.data.to_dict()
    replaced = {*GENERATED_KEYS, *({"license"} & after.keys())}
    merged = after | {key: value for key, value in before.items() if key not in replaced}
    tags = [tag for tag in before.get("tags", []) if tag not in GENERATED_TAGS]
    merged["tags"] = list(dict.fromkeys([*tags, *after.get("tags", [])]))
    front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{front}\n---\n\n{body}\n"


def _section(name: str) -> re.Pattern:
    begin = re.escape(BEGIN.format(name).split(" generated")[0])
    return re.compile(rf"^{begin} .*?^{re.escape(END.format(name))}$", re.MULTILINE | re.DOTALL)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for name in SECTIONS:
        found = _section(name).search(text)
        if found:
            yield name, found[0]
