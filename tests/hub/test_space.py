"""The Space of a published model: what leaves with it, and its app, started from its files alone, over HTTP and in a
browser.
"""

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers import AutoImageProcessor, AutoModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.hub_space.looking import opened
from hf_vicreg.publishing.drawn_pictures import drawn_pictures
from hf_vicreg.publishing.publish import publish
from hf_vicreg.publishing.push import Remote
from hf_vicreg.publishing.space import CHOSEN, DRAWN, stage_space
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.decoding import decode

HOSTILE = "<img src=x onerror=alert(1)>'\"</script>\x07\x1b[31m&lt;"
FILE_NAME = "my sister's <b onclick=alert(1)>.png"
PLANTED = "taken at home by Jane"
COUNT = 6
WIDTHS = (390, 1280)


def picture(index, size=(48, 40)):
    generator = np.random.default_rng(index)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).resize(size)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of somebody's, with hostile names and words inside; one cannot be read."""
    folder = tmp_path_factory.mktemp("mine") / "images"
    folder.mkdir()
    words = PngImagePlugin.PngInfo()
    words.add_text("Comment", PLANTED)
    for index in range(COUNT):
        picture(index).save(folder / f"{index}{FILE_NAME}", pnginfo=words, icc_profile=PLANTED.encode())
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def model(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "model"
    folder.mkdir()
    return stage(run_folder, folder, repo="lab/demo")


@pytest.fixture(scope="module")
def space(model, images):
    folder = model.folder.parent / "space"
    folder.mkdir()
    return stage_space(model, folder, images=images, endpoint="https://hub.test")


@contextlib.contextmanager
def serving(folder, environment, *flags):
    """Start what the Dockerfile starts, in its folder, where the package cannot be imported; gives the port."""
    command = json.loads(re.search(r"^CMD (.+)$", (folder / "Dockerfile").read_text(), re.MULTILINE)[1])
    log = folder.parent / "log.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = environment | {"HOST": "127.0.0.1", "PORT": str(port)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command[1:], *map(str, flags)], cwd=folder, env=environment, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 120
    while "Uvicorn running" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield port
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory):
    """The environment of an app of a Space: no package, no network."""
    conftest = request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py"))
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "hf_vicreg.py").write_text("raise ModuleNotFoundError('hf_vicreg is not here')")
    return conftest.child_environment(PYTHONPATH=str(hidden), HF_HOME=str(hidden / "home"))


@pytest.fixture(scope="module")
def port(model, space, alone):
    told = json.loads((space.folder / "model.json").read_text())
    folder = model.folder.parent / "served"
    shutil.copytree(space.folder, folder)
    (folder / "model.json").write_text(json.dumps(told | {"model": HOSTILE, "pictures": HOSTILE}))
    with serving(folder, alone, "--model", model.folder) as found:
        yield found


def ask(port, path, body=None):
    """Return status, headers and content of an answer; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def numbers(text):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


def test_pixels_alone_leave_and_no_name_of_a_file(space):
    modules = ("__init__.py", "app.py", "attention.py", "colours.py", "looking.py", "pictures.py")
    page = ("attention.js", "index.html", "page.css", "page.js", "space.css", "space.js")
    assert space.names == sorted(
        ["Dockerfile", "README.md", "model.json", "requirements.txt"]
        + [f"hub_space/{name}" for name in (*modules, *page)]
        + [f"pictures/{number:03d}.png" for number in range(1, COUNT + 1)]
    )
    for name in space.names:
        content = (space.folder / name).read_bytes()
        assert not any(word.encode() in content for word in (PLANTED, "sister", "onclick"))
    for index in range(COUNT):
        with Image.open(space.folder / f"pictures/{index + 1:03d}.png") as found:
            assert not found.info
            np.testing.assert_array_equal(np.asarray(found), np.asarray(picture(index)))
    assert "\n- lab/demo\n" in space.card
    assert "[lab/demo](https://hub.test/lab/demo)" in space.card
    assert json.loads((space.folder / "model.json").read_text())["pictures"] == CHOSEN


def test_without_a_word_no_image_of_the_users_leaves(model, tmp_path):
    found = stage_space(model, tmp_path, images=None, endpoint="https://hub.test")
    drawn = drawn_pictures()
    assert sum(name.startswith("pictures/") for name in found.names) == len(drawn)
    for number, expected in enumerate(drawn, 1):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"pictures/{number:03d}.png")), expected)
    assert len({one.tobytes() for one in drawn}) == len(drawn)
    assert json.loads((tmp_path / "model.json").read_text())["pictures"] == DRAWN


def test_what_comes_to_lie_in_the_folder_stays(space):
    (space.folder / "hub_space" / "late.pyc").write_text("x")
    assert "hub_space/late.pyc" not in {*space.names, *space.sizes}
    (space.folder / "hub_space" / "late.pyc").unlink()


def test_a_card_on_the_hub_is_kept_once_it_names_the_model(space):
    own = space.card
    space.keep_card("---\nsdk: docker\n---\n# what the Hub writes at first")
    assert space.card == own
    edited = (own + "\nmy words\n").replace("\n", "\r\n")
    space.keep_card(edited)
    assert "my words" in space.card
    space.keep_card(own)


def test_an_app_of_something_else_is_not_replaced(space):
    files = {"README.md": "1", ".gitattributes": "2"}
    other = "---\nsdk: gradio\n---\n# mine"
    space.refuse_another(Remote(space.repo, "main", "head", True, files, other, "space"))  # there is no app
    named = Remote(space.repo, "main", "head", True, files | {"app.py": "3"}, space.card, "space")
    space.refuse_another(named)
    with pytest.raises(InputError, match=r"`space`: expected no Space .* it has another app"):
        space.refuse_another(replace(named, card=other))


def test_features_and_attention_are_the_models(port, model):
    about = json.loads(ask(port, "/about")[2])
    assert about["count"] == COUNT
    encoder = AutoModel.from_pretrained(model.folder, attn_implementation="eager").eval()
    processor = AutoImageProcessor.from_pretrained(model.folder, backend="pil")
    features = numbers(about["features"]).view(COUNT, about["width"])
    for index in (0, COUNT - 1):
        look = json.loads(ask(port, f"/look/{index}")[2])
        with torch.no_grad():
            pixels = processor(picture(index), return_tensors="pt")["pixel_values"]
            expected = encoder(pixels, output_attentions=True)
        feature = torch.nn.functional.normalize(expected.pooler_output[0], dim=0)
        torch.testing.assert_close(features[index], feature, atol=1e-6, rtol=0)
        torch.testing.assert_close(numbers(look["feature"]), feature, atol=1e-6, rtol=0)
        (item,) = look["attention"]["items"]
        weights = numbers(item["weights"]).view(item["shape"])
        attention = torch.stack([one[0] for one in expected.attentions])
        places = [0 if one < 0 else item["leading"] + one for one in item["queries"]]
        torch.testing.assert_close(weights, attention[:, :, places], atol=1e-6, rtol=0)
        forbidden = torch.tensor([[[one == "." for one in line] for line in layer] for layer in item["levels"]])
        assert forbidden.any()
        assert (weights[..., item["leading"] :].transpose(0, 1)[:, forbidden] == 0).all()
        assert look["colours"].keys() == {"own", "all"}


def test_a_visitors_picture_is_looked_at_as_those_that_came_along(port):
    with io.BytesIO() as file:
        picture(2).save(file, "PNG")
        status, headers, content = ask(port, "/look", file.getvalue())
    assert status == 200
    assert "frame-ancestors 'self' https://huggingface.co" in headers["content-security-policy"]
    own, known = json.loads(content), json.loads(ask(port, "/look/2")[2])
    assert own["feature"] == known["feature"]
    assert own["colours"] == known["colours"]


def encoded(image, kind):
    with io.BytesIO() as file:
        image.save(file, kind)
        return file.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/look", b"no image", 400),
        ("/look", b"", 400),
        ("/look", encoded(picture(0), "PNG")[:200], 400),
        ("/look", encoded(picture(0), "EPS"), 400),
        ("/look", encoded(Image.new("1", (9000, 9000)), "PNG"), 400),
        ("/look", bytes(2**24 + 1), 413),
        ("/look/999", None, 404),
        ("/look/-1", None, 404),
        ("/picture/999", None, 404),
        ("/picture/../model.json", None, 404),
        ("/picture/..%2f..%2fmodel.json", None, 404),
        ("/model.json", None, 404),
        ("/app.py", None, 404),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(port, path, body, status):
    found, _, content = ask(port, path, body)
    assert found == status
    assert len(json.loads(content)["error"].splitlines()) == 1


def show(browser, port, width):
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"http://127.0.0.1:{port}/")
    wait = WebDriverWait(browser, 60)
    wait.until(lambda one: one.execute_script("return document.body.dataset.ready"))
    return wait


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_shows_features_neighbours_and_attention(browser, port, width):
    from selenium.webdriver import ActionChains

    wait = show(browser, port, width)
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth == {root}.clientWidth")
    browser.execute_script("document.querySelectorAll('#gallery button')[3].click()")
    wait.until(lambda one: one.execute_script("return document.body.dataset.chosen") == "picture 4")
    about, look = (json.loads(ask(port, path)[2]) for path in ("/about", "/look/3"))
    features = numbers(about["features"]).view(COUNT, -1)
    cosines = (features @ features[3]).tolist()
    nearest = sorted(set(range(COUNT)) - {3}, key=lambda one: -cosines[one])
    figures = browser.find_elements("css selector", "#near figure")
    assert [one.text for one in figures] == [f"{cosines[one]:.3f}" for one in nearest]
    over = "return document.getElementById('over').src"
    assert browser.execute_script(over) == look["colours"]["own"]
    browser.execute_script("document.getElementById('all').click()")
    assert browser.execute_script(over) == look["colours"]["all"]
    widget = browser.find_element("css selector", ".attention")
    image = widget.find_element("css selector", ".picker canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", image)
    rows, columns = look["grid"]
    x, y = (int((0.5 / count - 0.5) * image.size[side]) for side, count in (("width", columns), ("height", rows)))
    ActionChains(browser, duration=20).move_to_element_with_offset(image, x, y).click().perform()
    wait.until(lambda one: widget.get_attribute("data-query") == "0")
    assert len(widget.find_elements("css selector", ".heads canvas")) == np.prod(
        look["attention"]["items"][0]["shape"][:2]
    )
    broken = "return [...document.images].filter((one) => one.complete && !one.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_own_pictures_and_hostile_text_are_shown_as_they_are(browser, port, tmp_path):
    wait = show(browser, port, 1280)
    for place in ("title", "origin"):
        assert browser.execute_script(f"return document.getElementById('{place}').textContent") == HOSTILE
    mine = tmp_path / FILE_NAME
    picture(1).save(mine)
    browser.find_element("id", "file").send_keys(str(mine))
    wait.until(lambda one: one.execute_script("return document.body.dataset.chosen") == FILE_NAME)
    first = browser.find_element("css selector", "#near figure")
    assert first.text == "1.000"
    assert first.find_element("tag name", "img").get_attribute("alt") == "picture 2"
    (tmp_path / "broken.png").write_bytes(b"no image")
    browser.find_element("id", "file").send_keys(str(tmp_path / "broken.png"))
    trouble = browser.find_element("id", "trouble")
    wait.until(lambda one: trouble.is_displayed())
    assert trouble.text.startswith("broken.png: no picture that can be read")
    assert len(browser.find_elements("css selector", "#gallery button")) == COUNT + 1
    assert browser.execute_script("return document.querySelectorAll('[onerror], [onclick], main script').length") == 0
    assert [one for one in browser.get_log("browser") if "/look - Failed to load" not in one["message"]] == []


def test_what_cannot_be_a_space_is_refused(model, run_folder, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"none")
    for folder, told in ((tmp_path / "none", "expected a folder of images"), (tmp_path / "bad", "that can be read")):
        (tmp_path / folder.name / "into").mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match=f"`space_images`: .*{told}"):
            stage_space(model, tmp_path / folder.name / "into", images=folder, endpoint="https://hub.test")
    with pytest.raises(InputError, match="`space_images`: expected `space` beside it"):
        publish(run_folder, "lab/demo", space_images=tmp_path, dry_run=True)
    assert main(["publish", str(run_folder), "--repo", "lab/demo", "--space", "--create_pr"]) == 2
    assert "`space`, `create_pr`: expected one of the two" in capsys.readouterr().err
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    five = BigBirdViTModel(BigBirdViTConfig(**sizes, image_size=32, patch_size=8, tile_size=1, num_channels=5))
    five.save_pretrained(tmp_path / "five")
    channels = {"channel_low": [0.0] * 5, "channel_high": [1.0] * 5}
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}, **channels).save_pretrained(tmp_path / "five")
    for name in ("m", "s"):
        (tmp_path / name).mkdir()
    other = stage(tmp_path / "five", tmp_path / "m", repo="lab/five")
    with pytest.raises(InputError, match="`space`: expected an encoder of images of three colours"):
        stage_space(other, tmp_path / "s", images=None, endpoint="https://hub.test")


@pytest.mark.slow
def test_published_twice_and_run_from_the_hub_alone(hub, publishing, run_folder, images, alone, tmp_path):
    words = ["publish", str(run_folder), "--repo", "lab/demo", "--space", "--space_images", str(images)]
    (first,) = publishing([{"cli": words}])
    assert first["code"] == 0, first["err"]
    assert "pictures/006.png" in first["out"]
    assert f"{hub.url}/spaces/lab/demo at" in first["out"]
    tree = hub.repositories["spaces/lab/demo"].tree()
    assert not any(name.endswith(".pyc") or "late" in name for name in tree)
    head = hub.repositories["lab/demo"].branches["main"]
    assert json.loads(tree["model.json"])["revision"] == head
    for name, content in tree.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "h")}
    hub.calls.clear()
    with serving(tmp_path / "space", alone | online) as port:
        assert json.loads(ask(port, "/about")[2])["model"] == "lab/demo"
        assert ask(port, "/look/0")[0] == 200
    assert any(f"/lab/demo/resolve/{head}/modeling_bigbird_vit.py" in path for _, path, _ in hub.calls)
    (tmp_path / "fewer").mkdir()
    shutil.copy(Path(images) / f"0{FILE_NAME}", tmp_path / "fewer" / "0.png")
    (fewer,) = publishing([{"cli": [*words[:-1], str(tmp_path / "fewer")]}])
    assert fewer["code"] == 0, fewer["err"]
    assert fewer["out"].count("nothing had changed") == 1, "the model alone"
    tree = hub.repositories["spaces/lab/demo"].tree()
    assert [name for name in tree if name.startswith("pictures/")] == ["pictures/001.png"]


def test_a_picture_of_16_bits_is_what_training_makes_of_it():
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    with io.BytesIO() as file:
        Image.fromarray(values).save(file, "PNG")
        found = opened(file.getvalue())
        trained = decode(file.getvalue(), (1, 1), None)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(trained))
    assert np.asarray(found).mean() < 140
