"""The parts of a page that need images and the run's encoder: views, neighbours, patches, attention, map, classes."""

import base64
import logging
from typing import Any

import torch

from hf_vicreg.hub_space.attention import lattice
from hf_vicreg.hub_space.colours import PatchColours, colour_images
from hf_vicreg.hub_space.pictures import data_uri
from hf_vicreg.report.attention import attention_maps, grid_of
from hf_vicreg.report.page import picture, shown
from hf_vicreg.report.patches import MAX_PATCHES, given_at, patch_tokens
from hf_vicreg.report.pictures import atlas, drawn_views, normalisation_of
from hf_vicreg.report.run_facts import RunFacts
from hf_vicreg.report.run_images import ReportImages, readable
from hf_vicreg.report.space import NUM_NEIGHBOURS, Space
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import VisionEncoder

logger = logging.getLogger(__name__)

NUM_VIEWED, NUM_PATCHED, NUM_ATTENDED = 10, 6, 4
SMALL = 128  # side in pixels of images that stand in rows
ATTENTION_BYTES = 3_200_000  # of a page, before they become text
MOST_MAPS = 2**30  # bytes of the attention of one image, all layers and heads; it is held some three times
MAX_NAMED_CLASSES = 40
SCALES = (1, 2)


def views_part(facts: RunFacts, encoder: VisionEncoder, images: ReportImages) -> str:
    """Return ten training images, each with its views."""
    source = images.train.first(facts.recipe.get("max_train_samples"))
    found = readable(source, NUM_VIEWED)
    norm = normalisation_of(encoder.processor)
    rows = drawn_views(source, list(found), facts.recipe, encoder.model.config, norm)
    cells = []
    for (place, image), views in zip(found.items(), rows, strict=False):
        name = source.describe(place)
        shots = "".join(picture(data_uri(view, SMALL), f"a view of {name}", "pixels") for view in views[:4])
        cells.append(f'<div class="views">{picture(data_uri(image, SMALL), name, "pixels first")}{shots}</div>')
    return f'<div class="view-grid">{"".join(cells)}</div>'


def neighbours_part(space: Space, images: ReportImages) -> str:
    """Return a few held-out images and what is nearest to each."""
    names = images.label_names
    rows = []
    for query, nearest in zip(space.queries, space.nearest, strict=True):
        held_out = space.held_out
        title = images.name_of(held_out.places[query])
        cells = [f"<figure>{picture(data_uri(held_out.images[query]), title, 'pixels first')}</figure>"]
        for place, cosine in nearest[:NUM_NEIGHBOURS]:
            kind, word = "", ""
            if names is not None and space.bank.labels is not None and held_out.labels is not None:
                label = int(space.bank.labels[place])
                same = label == int(held_out.labels[query])
                kind, word = (" same" if same else " other"), f"{names[label]} "
            cells.append(
                f"<figure>{picture(data_uri(space.bank.images[place]), f'{word}cosine {cosine:.3f}', 'pixels' + kind)}"
                f'<figcaption><span>{shown(word)}</span><span class="number">{cosine:.2f}</span></figcaption></figure>'
            )
        rows.append(f'<div class="neighbours">{"".join(cells)}</div>')
    legend = ""
    if names is not None:
        legend = '<p class="hint"><span class="key same"></span>same class <span class="key other"></span>another</p>'
    return f'<div class="neighbour-rows">{"".join(rows)}</div>{legend}'


def patches_part(encoder: VisionEncoder, images: ReportImages) -> str:
    """Return a few held-out images under the colours of their patches' tokens, at two sizes."""
    shown_images = list(readable(images.held_out, NUM_PATCHED).values())
    colours, columns = None, [[picture(data_uri(image, SMALL), "the image", "pixels first")] for image in shown_images]
    sizes = []
    for scale in SCALES:
        given = given_at(encoder, shown_images, scale)
        height, width = given.pixels.shape[-2:]
        try:
            if scale > 1 and _num_patches(encoder, height, width) > MAX_PATCHES:
                raise InputError(f"`MODEL`: more than {MAX_PATCHES} patches at {height}x{width} pixels.")
            tokens = patch_tokens(encoder, given.pixels)
        except InputError:
            if colours is None:
                raise
            continue
        colours = colours or PatchColours(tokens)
        for column, image, colour in zip(columns, given.shown, colour_images(colours(tokens)), strict=True):
            column.append(
                f'<div class="stack">{picture(data_uri(image), "the image", "pixels")}'
                f"{picture(data_uri(colour), 'its patches as colours', 'pixels over')}</div>"
            )
        sizes.append(f"{height}x{width} pixels ({tokens.shape[1]}x{tokens.shape[2]} patches)")
    slider = (
        '<label class="slider">colours over image <input type="range" min="0" max="100" value="80" '
        'class="opacity"></label>'
    )
    grid = "".join(f'<div class="patch-column">{"".join(column)}</div>' for column in columns)
    return (
        f'<div class="patches"><div class="tools">{slider}<span class="hint">from the top: the image, '
        f'{shown(", ".join(sizes))}</span></div><div class="patch-grid">{grid}</div></div>'
    )


def _num_patches(encoder: VisionEncoder, height: int, width: int) -> int:
    rows, columns = grid_of(encoder.model, height, width) if _has_patches(encoder) else (1, 1)
    return rows * columns


def _has_patches(encoder: VisionEncoder) -> bool:
    config = encoder.model.config
    return hasattr(config, "grid_size") or getattr(config, "patch_size", None) is not None


def attention_data(encoder: VisionEncoder, images: ReportImages, budget: int) -> dict[str, Any]:
    """Return what the page's script shows of attention: images, and for each a number for every pair that is shown.

    Args:
        encoder: The run's.
        images: Held-out ones.
        budget: Bytes of numbers; patches that look are thinned out to stay below it.

    Raises:
        InputError: A model without attention over patches, or of too many of them.
    """
    model, config = encoder.model, encoder.model.config
    some = list(readable(images.held_out, NUM_ATTENDED).items())
    layers, heads = (int(getattr(config, name, 0)) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        raise InputError(f"`MODEL`: expected one with attention over patches, got a {config.model_type!r}.")
    items: list[dict[str, Any]] = []
    for scale in SCALES if config.model_type == "bigbird_vit" else SCALES[:1]:
        given = given_at(encoder, [image for _, image in some], scale)
        height, width = given.pixels.shape[-2:]
        rows, columns = grid_of(model, height, width)
        a_query = 4 * layers * heads * (rows * columns + 1)
        if a_query * (rows * columns + 1) > MOST_MAPS:
            if items:
                continue
            raise InputError(
                f"`MODEL`: expected attention of at most {MOST_MAPS / 2**30:g} GB, of {rows * columns:,} patches in "
                f"{layers} layers of {heads} heads has {a_query * (rows * columns + 1) / 2**30:.1f}."
            )
        count = min(len(some), budget // len(SCALES) // (a_query * (rows * columns + 1)))
        if items and not count:
            continue  # the larger size is a luxury
        # where all patches are too many, there is one size and one image, with as many of them as fit
        queries = lattice(rows, columns, rows * columns if count else max(1, budget // a_query - 1))
        for (place, _), pixels, image in list(zip(some, given.pixels, given.shown, strict=True))[: max(1, count)]:
            maps = attention_maps(model, pixels[None], [-1, *queries])
            items.append(
                {
                    "name": images.name_of(place),
                    "size": f"{height}x{width} pixels",
                    "image": data_uri(image),
                    "grid": list(maps.grid),
                    "leading": maps.leading,
                    "queries": maps.queries,
                    "shape": list(maps.weights.shape),
                    "weights": base64.b64encode(maps.weights.numpy().astype("<f4").tobytes()).decode(),
                    "tiles": maps.tile_of_patch,
                    "levels": maps.levels,
                }
            )
    return {"items": items}


def attention_part(run: int) -> str:
    """Return the place that the page's script fills with a run's attention."""
    return f'<div class="attention" data-run="{run}"></div>'


def map_data(space: Space, images: ReportImages) -> dict[str, Any]:
    """Return what the page's script draws a map from."""
    sheet, columns = atlas(space.held_out.images)
    names, labels = images.label_names, space.held_out.labels
    return {
        "maps": {name: (points * 10_000).round().long().tolist() for name, points in space.maps.items()},
        "labels": None if labels is None else labels.tolist(),
        "classes": names,
        "names": [images.name_of(place) for place in space.held_out.places],
        "atlas": data_uri(sheet, max(sheet.size)),
        "columns": columns,
        "side": sheet.width // columns,
    }


def map_part(run: int, space: Space, images: ReportImages) -> str:
    """Return the place that the page's script draws a map into."""
    number, everything = len(space.held_out.places), images.all_held_out
    of = f"{number:,} of {everything:,}" if number < everything else f"{number:,}"
    unlabelled = ". No test split with labels was found: they may be those that the encoder learned from"
    of_which = " of the test split" if images.is_apart else unlabelled
    return f'<div class="map" data-run="{run}"></div><p class="hint">{of} images{of_which}.</p>'


def confusion_part(space: Space, images: ReportImages) -> str:
    """Return which classes a k-NN takes for which, as a table; of many classes, the pairs most often confused."""
    counts, names = space.confusion, images.label_names
    assert counts is not None
    assert names is not None
    right, total = int(counts.diagonal().sum()), int(counts.sum())
    bank = f"{len(space.bank.places):,} training images"
    said = f"{space.neighbours}-NN among {bank}: {right / total:.3f} of {total:,} images right."
    if len(names) > MAX_NAMED_CLASSES:
        return f"<p>{shown(said)}</p>{_pairs(counts, names)}"
    shares = 100 * counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    head = "".join(f'<th scope="col"><span>{shown(name)}</span></th>' for name in names)
    rows = []
    for name, row, number in zip(names, shares.tolist(), counts.tolist(), strict=True):
        cells = "".join(
            f'<td class="s{round(share / 10)}" title="{count} images">{f"{share:.0f}" if share >= 0.5 else ""}</td>'
            for share, count in zip(row, number, strict=True)
        )
        rows.append(f'<tr><th scope="row">{shown(name)}</th>{cells}</tr>')
    return (
        f'<p>{shown(said)} <span class="hint">Rows: the true class; columns: what it is taken for, in percent of the '
        f'row.</span></p><div class="wide"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pairs(counts: torch.Tensor, names: list[str]) -> str:
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    best = wrong.flatten().topk(min(20, wrong.numel()))
    rows = "".join(
        f"<tr><td>{shown(names[place // len(names)])}</td><td>{shown(names[place % len(names)])}</td>"
        f"<td>{count}</td></tr>"
        for place, count in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if count
    )
    return (
        '<table class="facts"><thead><tr><th>true class</th><th>taken for</th><th>images</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
