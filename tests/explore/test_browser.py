"""The explorer in a real browser, as people use it: pointing, searching, selecting, exporting, narrow and wide."""

import csv
import io
import time

import pytest

from .conftest import COPIES, HOSTILE

pytestmark = pytest.mark.browser
WIDTHS = (390, 1280)


def show(browser, port, width):
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"http://127.0.0.1:{port}/")
    wait = WebDriverWait(browser, 60)
    wait.until(lambda one: one.execute_script("return document.body.dataset.ready"))
    return wait


def on_map(browser, row):
    """Move the pointer to an image's place on the map."""
    from selenium.webdriver import ActionChains

    canvas = browser.find_element("id", "canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    x, y = browser.execute_script(f"return app.map.at({row})")
    size = canvas.size
    return ActionChains(browser, duration=20).move_to_element_with_offset(
        canvas, int(x - size["width"] / 2), int(y - size["height"] / 2)
    )


def press(browser, text):
    script = "[...document.querySelectorAll('button')].find((one) => one.textContent.startsWith(arguments[0])"
    browser.execute_script(f"{script} && one.getClientRects().length).click()", text)


def downloaded(browser, name):
    path, deadline = browser.downloads / name, time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    text = path.read_text()
    path.unlink()
    return text


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_in_every_panel_and_has_no_error(browser, port, width):
    wait = show(browser, port, width)
    root = "document.documentElement"
    for name in ("search", "copies", "outliers", "clusters", "labels"):
        browser.execute_script(f"document.getElementById('tab-{name}').click()")
        wait.until(lambda one, at=name: one.find_element("id", f"panel-{at}").is_displayed())
        assert browser.execute_script(f"return {root}.scrollWidth == {root}.clientWidth"), name
    rows = browser.execute_script("return document.querySelectorAll('#panel-copies .group').length")
    assert rows >= COPIES
    broken = "return [...document.images].filter((one) => one.complete && !one.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_pointing_shows_an_image_and_clicking_those_alike(browser, port, explorer, width):
    wait = show(browser, port, width)
    row = browser.execute_script("return app.map.shown()[0]")
    on_map(browser, row).perform()
    tip = browser.find_element("id", "tip")
    names = {explorer.images.shown_name(one) for one in range(len(explorer))}
    wait.until(lambda one: tip.is_displayed() and tip.text in names)
    on_map(browser, row).click().perform()
    tiles = "return [...document.querySelectorAll('#panel-search .tile')].map((one) => Number(one.dataset.row))"
    wait.until(lambda one: len(one.execute_script(tiles)) == 24)
    picked = browser.execute_script("return app.picked")
    assert browser.execute_script(tiles) == [one for one, _ in explorer.near_row(picked, 24)]
    assert browser.get_log("browser") == []


def test_zooming_comes_closer_and_shows_images(browser, port):
    wait = show(browser, port, 1280)
    press(browser, "Closer")
    wait.until(lambda one: one.execute_script("return app.map.view.zoom") == 2)
    script = (
        "document.getElementById('canvas').dispatchEvent(new WheelEvent('wheel', {deltaY: -200, cancelable: true}))"
    )
    browser.execute_script(script)
    assert browser.execute_script("return app.map.view.zoom") > 2.5
    press(browser, "Whole map")
    assert browser.execute_script("return app.map.view.zoom") == 1


def test_an_image_of_ones_own_finds_its_like(browser, port, explorer, images):
    wait = show(browser, port, 1280)
    browser.find_element("id", "file").send_keys(str(images / "sub" / "030.png"))
    first = "return Number(document.querySelector('#panel-search .tile')?.dataset.row ?? -1)"
    wait.until(lambda one: one.execute_script(first) >= 0)
    assert explorer.images.file_name(browser.execute_script(first)) == "sub/030.png"
    browser.find_element("id", "file").send_keys(str(images / "broken.png"))
    trouble = browser.find_element("id", "trouble")
    wait.until(lambda one: trouble.is_displayed())
    assert "not an image" in trouble.text
    assert [one for one in browser.get_log("browser") if "/near - Failed to load" not in one["message"]] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_box_selects_and_the_list_is_saved(browser, port, explorer, width):
    wait = show(browser, port, width)
    press(browser, "Select a box")
    on_map(browser, 0).perform()  # into view
    canvas = browser.find_element("id", "canvas")
    from selenium.webdriver import ActionChains

    half = canvas.size["width"] // 2 - 3, canvas.size["height"] // 2 - 3
    chain = ActionChains(browser, duration=50).move_to_element_with_offset(canvas, -half[0], -half[1])
    chain.click_and_hold().move_to_element_with_offset(canvas, *half).release().perform()
    wait.until(lambda one: one.find_element("id", "bar").is_displayed())
    assert browser.execute_script("return app.selected.size") == len(explorer)
    press(browser, "List of files")
    expected = explorer.files_text(list(range(len(explorer)))).decode()
    assert downloaded(browser, "files.txt") == expected
    press(browser, "Clear")
    assert not browser.find_element("id", "bar").is_displayed()
    assert browser.get_log("browser") == []


def test_labels_spread_and_are_saved(browser, port, explorer):
    wait = show(browser, port, 1280)
    press(browser, "Labels")
    for label, rows in ((HOSTILE, [3, 4, 5]), ("plain", [30, 31])):
        browser.execute_script("app.select(arguments[0], true)", rows)
        browser.execute_script("document.getElementById('label').value = arguments[0]", label)
        press(browser, "Label the selected")
        wait.until(lambda one, at=label: one.execute_script("return app.labels?.names.length") == 1 + (at == "plain"))
        alone = "As long as there is one class" in browser.find_element("id", "panel-labels").text
        assert alone == (label == HOSTILE)
    wait = show(browser, port, 1280)  # as after F5, or on another day
    browser.execute_script("document.getElementById('tab-labels').click()")
    assert browser.execute_script("return app.labels?.names.length") == 2
    items = browser.find_elements("css selector", ".tally li")
    assert "onerror" in items[0].text
    assert "2 by hand" in items[1].text
    press(browser, "Save labels.csv")
    rows = list(csv.DictReader(io.StringIO(downloaded(browser, "labels.csv"), newline="")))
    given = [row["file_name"] for row in rows if row["source"] == "given"]
    assert given == [explorer.images.file_name(row) for row in (3, 4, 5, 30, 31)]
    assert {row["label"] for row in rows} <= set(browser.execute_script("return app.labels.names"))
    press(browser, "Remove")
    wait.until(lambda one: one.execute_script("return app.labels.names") == ["plain"])
    browser.execute_script("localStorage.clear()")
    assert browser.get_log("browser") == []


def test_hostile_names_are_text(browser, port):
    wait = show(browser, port, 1280)
    row = browser.execute_script("return app.about.count") - 1
    for one in range(row + 1):
        browser.execute_script(f"app.nameOf({one})")
    found = browser.execute_async_script(
        "const done = arguments[0]; Promise.all(app.names.values()).then((names) => done(names))"
    )
    place = next(name for name in found if "onerror" in name)
    hostile = browser.execute_async_script(
        "const [name, done] = arguments;"
        "Promise.all([...app.names].map(async ([row, one]) => [row, await one]))"
        ".then((pairs) => done(pairs.find(([, one]) => one === name)[0]))",
        place,
    )
    browser.execute_script(f"app.pick({hostile})")
    wait.until(lambda one: place in one.find_element("id", "panel-search").text)
    assert browser.execute_script("return document.querySelectorAll('img[onerror], #panel-search script').length") == 0
    assert browser.get_log("browser") == []
