"""The page of a run: what it shows equals what the run and the model say, and nothing in it is anybody else's."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoImageProcessor, AutoModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.hub_space.attention import lattice
from hf_vicreg.hub_space.colours import PatchColours
from hf_vicreg.report import seen
from hf_vicreg.report.attention import attention_maps
from hf_vicreg.report.page import data_block
from hf_vicreg.report.report import write_report
from hf_vicreg.report.run_facts import read_facts
from hf_vicreg.report.run_images import _numbered, open_images, spread
from hf_vicreg.report.space import maps_of
from hf_vicreg.report.told import panels_of, thinned
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_vision_encoder
from hf_vicreg.training.images.image_source import ImageSource

MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def page(page_file):
    return page_file.read_text()


@pytest.fixture(scope="module")
def conftest(request):
    return request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "report" / "conftest.py"))


def content_of(page):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(found, parse_constant=refuse)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text, self.within = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.within = tag
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within not in ("script", "style"):
            self.text.append(data)


def test_page_is_one_small_file_that_loads_nothing(page):
    assert len(page) < MAX_BYTES
    elements = Elements(page).found
    for _, attributes in elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), attributes
    policy = next(one["content"] for tag, one in elements if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_page_holds_planted_text_as_text_alone(page, conftest):
    parsed = Elements(page)
    assert [one.get("type") for tag, one in parsed.found if tag == "script"] == ["application/json", None]
    assert not any(name.startswith("on") for _, attributes in parsed.found for name in attributes)
    assert not any(tag in ("b", "iframe", "object", "form") for tag, _ in parsed.found)
    text = "".join(parsed.text)
    assert "<img src=x onerror=alert(1)></script>" in text  # of results and recipe
    assert '<b onclick="alert(3)">' in text  # the run's folder
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    content = content_of(page)  # which is JSON without NaN
    assert any(conftest.NAME[:-1] in name for name in content["maps"][0]["names"])
    assert content["maps"][0]["classes"] == [f"{conftest.NAME[:-1]}\\x07", "plain"]


def test_data_end_no_script_and_hold_finite_numbers_alone():
    planted = "</script><!-- <script>\u2028 &lt; '\""
    (found,) = re.findall(
        r'<script type="application/json" id="data">([^<>]*)</script>', data_block("data", [planted])
    )
    assert json.loads(found) == [planted]
    with pytest.raises(ValueError, match="JSON"):
        data_block("data", [float("nan")])


def test_page_names_no_place_of_the_machine(page, run, images):
    for place in (run.parent, images):
        assert str(place) not in page


def test_the_table_of_confused_classes_says_among_how_many_images(page):
    assert re.search(r"<p>\d+-NN among 48 training images: [01]\.\d{3} of 16 images right\.", page)


def test_curves_equal_the_log(page, run):
    content = content_of(page)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (loss,) = next(panel for panel in content["panels"] if panel["title"] == "Loss")["curves"]
    assert loss["steps"] == [one["step"] for one in records[:-1]]
    assert loss["values"] == [one["loss"] for one in records[:-1]]


def weights_of(item):
    return np.frombuffer(base64.b64decode(item["weights"]), "<f4").reshape(item["shape"])


def test_attention_equals_the_eager_model_and_is_zero_where_forbidden(page, run, images):
    model = AutoModel.from_pretrained(run, attn_implementation="eager").eval()
    items = content_of(page)["attention"][0]["items"]
    assert {tuple(item["grid"]) for item in items} == {(4, 4), (8, 8)}
    processor = AutoImageProcessor.from_pretrained(run)
    held_out = open_images(str(images), read_facts(run)).held_out
    forbidden = 0
    for item in items:
        rows, columns = item["grid"]
        image = held_out.read(int(re.search(r"row (\d+)", item["name"])[1]))
        pixels = processor([image], size={"height": rows * 8, "width": columns * 8}, return_tensors="pt")[
            "pixel_values"
        ]
        with torch.no_grad():
            expected = torch.stack(model(pixels, output_attentions=True).attentions)[:, 0]
        assert item["queries"] == [-1, *range(rows * columns)]
        found = torch.tensor(weights_of(item))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        for layer, pattern in enumerate(model.attention_patterns(rows * 8, columns * 8)):
            back = pattern.order.argsort()
            sees = pattern.token_mask()[0, 1:, 1:][back][:, back]
            assert (found[layer][:, 1:, 1:][:, ~sees] == 0).all()
            for query, letters in enumerate(item["levels"][layer][1:]):
                assert [letter != "." for letter in letters] == sees[query].tolist()
            forbidden += int((~sees).sum())
    assert forbidden


@pytest.mark.parametrize(
    "pattern",
    [{"tile_size": 2, "num_global_tiles": 1}, {"attention_layout": "raster", "block_size": 3}],
    ids=["tiles", "raster"],
)
def test_levels_and_zeros_follow_the_pattern_in_raster_order(pattern):
    config = BigBirdViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=56, patch_size=8,
        num_register_tokens=2, num_random_blocks=1, **pattern,
    )  # fmt: skip
    model = BigBirdViTModel(config).eval()
    maps = attention_maps(model, torch.randn(1, 3, 56, 40), [-1, 0, 8, 34])
    assert (maps.grid, maps.leading) == ((7, 5), 3)
    for layer, own in enumerate(model.attention_patterns(56, 40)):
        back = own.order.argsort()
        sees = own.token_mask()[0, 3:, 3:][back][:, back]
        for place, query in enumerate(maps.queries[1:], start=1):
            assert [letter != "." for letter in maps.levels[layer][place]] == sees[query].tolist()
            assert ((maps.weights[layer, :, place, 3:] == 0) == ~sees[query]).all()
            assert maps.levels[layer][place][query] == "q"
        assert not sees[8].all()
    assert (maps.weights[:, :, 0] > 0).all()  # CLS sees everything


def test_patches_that_look_are_thinned_out():
    assert lattice(4, 4, 16) == list(range(16))
    found = lattice(14, 14, 50)
    assert len(found) == 49
    assert len({one // 14 for one in found}) == len({one % 14 for one in found}) == 7
    assert lattice(1, 9, 3) == [1, 4, 7]
    for rows, columns, most in ((14, 14, 55), (32, 32, 10), (3, 40, 7), (40, 3, 7), (5, 5, 1)):
        found = lattice(rows, columns, most)
        assert most / 2 < len(found) <= most
        assert len(set(found)) == len(found)
        assert max(found) < rows * columns


def test_attention_of_a_dense_vit_and_of_a_resnet():
    from transformers import ResNetConfig, ResNetModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model, pixels = ViTModel(config).eval(), torch.randn(1, 3, 16, 16)
    found = attention_maps(model, pixels)
    assert model.config._attn_implementation == "sdpa"
    assert found.levels == []
    assert found.queries == [-1, 0, 1, 2, 3]
    model.set_attn_implementation("eager")
    expected = torch.stack(model(pixels, output_attentions=True).attentions)[:, 0]
    torch.testing.assert_close(found.weights, expected, atol=1e-6, rtol=0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    without_cls = SiglipVisionModel(SiglipVisionConfig(**shape, image_size=16, patch_size=8)).eval()
    found = attention_maps(without_cls, pixels, [-1, 0, 3])
    assert (found.queries, found.leading) == ([0, 3], 0)
    without_cls.set_attn_implementation("eager")
    (expected,) = without_cls(pixels, output_attentions=True).attentions
    torch.testing.assert_close(found.weights[0], expected[0][:, [0, 3]], atol=1e-6, rtol=0)
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    with pytest.raises(InputError, match="attention over patches"):
        attention_maps(resnet, pixels)


def test_colours_of_patches_are_principal_components():
    tokens = torch.randn(2, 3, 4, 6) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1])
    flat = tokens.flatten(0, 2).double()
    colours = PatchColours(tokens)
    assert ((colours(tokens) >= 0) & (colours(tokens) <= 1)).all()
    covariance = torch.cov(flat.T)
    _, eigenvectors = torch.linalg.eigh(covariance)
    for component, expected in zip(colours.components, eigenvectors.T.flip(0), strict=False):
        torch.testing.assert_close((component @ expected).abs(), torch.ones(()).double(), atol=1e-8, rtol=0)


def test_long_logs_are_thinned_out_and_keep_their_spikes():
    points = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 99.0)
    found = thinned(points)
    assert len(found) <= 1000
    assert (4321, 99.0) in found
    assert found == sorted(found)
    records = [{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 3.0, "invariance": 0.0}]
    panel, parts = panels_of([records], {}, ["invariance"])
    assert not parts["log"]
    assert panel["curves"][0]["values"] == [3.0]


def test_of_many_images_some_are_taken_from_everywhere():
    assert spread(7, 1000) == list(range(7))
    found = spread(100_000, 1000)
    assert len(set(found)) == 1000
    assert (found[0], found[-1]) == (0, 99_900)


def test_features_that_are_all_one_have_a_map():
    """As of a collapsed run, whose report one wants to see: scikit-learn's t-SNE would end the process."""
    assert set(maps_of(torch.ones(150, 8))) == {"PCA"}
    assert set(maps_of(torch.randn(150, 8))) == {"PCA", "t-SNE"}


def test_labels_with_gaps_are_numbered():
    train = ImageSource("a", 3, bytes, "", labels=[200_000, 7, 7])
    test = ImageSource("b", 2, bytes, "", labels=[7, 9])
    for one, labels in zip(_numbered(train, test), ([2, 0, 0], [0, 1]), strict=True):
        assert (one.labels, one.label_names) == (labels, ["7", "9", "200000"])
    named = replace(train, labels=[0, 1, 1], label_names=["x", "y"])
    assert _numbered(named, None) == (named, None)


def test_attention_over_too_many_patches_is_not_computed(run, images, monkeypatch):
    encoder, facts = load_vision_encoder(str(run)), read_facts(run)
    monkeypatch.setattr(seen, "MOST_MAPS", 1000)
    with pytest.raises(InputError, match=r"expected attention of at most .* patches in .* heads has"):
        seen.attention_data(encoder, open_images(str(images), facts), seen.ATTENTION_BYTES)


def test_without_images_the_parts_that_need_them_say_so(run, tmp_path):
    page = write_report(run, output=tmp_path / "report.html").read_text()
    assert page.count("Needs images, and there are none at hand") == 5
    assert content_of(page)["attention"] == [None]
    assert "data:image/jpeg" not in page


def test_a_test_split_without_labels_is_not_said_to_be_absent(run, conftest, tmp_path):
    for split, count in (("train", 6), ("test", 4)):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for index in range(count):
            conftest.noise(index).save(tmp_path / "plain" / split / f"{index}.png")
    page = write_report(run, data=str(tmp_path / "plain"), output=tmp_path / "report.html").read_text()
    assert "6 images. No test split with labels was found: they may be those that the encoder learned from." in page
    assert "There is no test split" not in page


def test_a_recipe_is_not_followed_to_images(run, images, tmp_path):
    copy = copied(run, tmp_path)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"dataset_name": str(images)}))
    page = write_report(copy).read_text()
    assert "there are none at hand" in page
    assert str(images) not in page


@pytest.mark.parametrize("name", ["log.jsonl", "recipe.yaml", "results.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(run, images, tmp_path, name):
    copy = copied(run, tmp_path)
    (copy / name).rename(tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    if name == "model.safetensors":
        page = write_report(copy, data=str(images)).read_text()
        assert "got a link out of it" in page
        assert str(tmp_path) not in page
    else:
        with pytest.raises(InputError, match="got a link out of it"):
            write_report(copy)


def copied(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_an_unfinished_run_has_its_curves(run, tmp_path):
    copy = copied(run, tmp_path)
    for name in ("config.json", "results.json", "model.safetensors"):
        (copy / name).unlink()
    page = write_report(copy, data="digits").read_text()
    assert "which is there when the run is finished" in page
    assert content_of(page)["panels"]


def test_an_encoder_of_other_channels_says_so(run, tmp_path):
    copy = copied(run, tmp_path)
    config = BigBirdViTConfig.from_pretrained(run)
    config.num_channels = 2
    BigBirdViTModel(config).save_pretrained(copy)
    assert write_report(copy, data="digits").read_text().count("takes 2 channels") == 5


def test_an_encoder_of_deeper_images_says_so(run, tmp_path):
    copy = copied(run, tmp_path)
    ranges = {"channel_low": [0.0] * 3, "channel_high": [4095.0] * 3}
    BigBirdViTImageProcessor(size={"height": 16, "width": 16}, **ranges).save_pretrained(copy)
    assert write_report(copy, data="digits").read_text().count("Shows images of 8 bits alone") == 5


def test_both_sizes_and_the_beginning_are_told(run, tmp_path):
    other = copied(run, tmp_path)
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["views"] = (recipe.get("views") or {}) | {"image_size": 20}
    recipe["model"] |= {"image_size": 28}
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model_name_or_path": "source"}))
    results = json.loads((other / "results.json").read_text())
    results["knn_accuracy"] = {"raw_pixels": 0.25, "untrained": 0.375, "trained": 0.5}
    (other / "results.json").write_text(json.dumps(results))
    page = write_report(other, output=tmp_path / "sizes.html").read_text()
    assert "views of 20 pixels, used with 28, patches of" in page
    assert "on the views" in page
    assert "k-NN, what it began with" in page
    assert "k-NN, untrained" not in page


def test_two_runs_stand_side_by_side(run, tmp_path):
    other = copied(run, tmp_path)
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"learning_rate": 0.125}))
    path = write_report(run, other, output=tmp_path / "both.html")
    page = path.read_text()
    assert "<td>learning_rate</td><td>0.001</td><td>0.125</td>" in page
    assert {curve["run"] for curve in content_of(page)["panels"][0]["curves"]} == {0, 1}


def test_a_sick_run_is_called_sick(run, tmp_path):
    copy = copied(run, tmp_path)
    lines = [
        {"step": step, "loss": 20.0, "embedding_std_mean": 0.001, "embedding_rank": 1.0, "covariance_ratio": 1.0}
        for step in range(1, 40)
    ]
    (copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_facts(copy)
    assert not facts.is_healthy
    assert facts.verdict.startswith("At step 39, ")


def test_command_writes_the_page_and_refuses_what_is_no_run(run, tmp_path, capsys):
    copy = copied(run, tmp_path)
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(copy), "--data", str(tmp_path / "nothing")]) == 2
    assert main(["report", str(copy), str(copy), str(copy)]) == 2
    assert main(["report", str(copy), "--output", str(tmp_path / "no" / "report.html")]) == 2
    assert main(["report", str(copy), "--output", str(tmp_path)]) == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert line.startswith("error: `") or "Writing" in line or "%" in line, line


def test_figures_show_what_the_model_says(run, conftest):
    import hf_vicreg

    model, image = AutoModel.from_pretrained(run).eval(), conftest.noise(5)
    figure = hf_vicreg.show_attention(model, image, patch=(1, 2), layers=[1])
    pixels = AutoImageProcessor.from_pretrained(run)([image], return_tensors="pt")["pixel_values"]
    expected = attention_maps(model, pixels).weights[1, :, 1 + 1 * 4 + 2, 1:].view(-1, 4, 4)
    shown = torch.stack([torch.tensor(axes.images[0].get_array().data) for axes in figure.axes[1:]])
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)
    assert len(hf_vicreg.show_features(run, [image, conftest.noise(6)], scale=2).axes) == 4
    views = hf_vicreg.show_views(image, {"crop_min_ratio": 0.5}, image_size=32, count=3)
    assert [axes.get_title() for axes in views.axes if axes.images] == ["image", "view", "view", "view"]
    with pytest.raises(InputError, match="`patch`"):
        hf_vicreg.show_attention(model, image, patch=(4, 0))
    with pytest.raises(InputError, match="`layers`"):
        hf_vicreg.show_attention(model, image, layers=[2])
    with pytest.raises(InputError, match="evaluation mode"):
        hf_vicreg.show_features(model.train(), [image])


def test_page_and_plots_have_the_same_colours():
    from importlib import resources

    from hf_vicreg.training.monitor import style

    sheet = (resources.files("hf_vicreg.report") / "page.css").read_text()
    for colour in (*style.SERIES, style.RIGHT, style.WRONG, style.INK, style.SOFT, style.LINE):
        assert colour in sheet
