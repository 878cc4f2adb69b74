"""The page in a real browser, as people use it: pointing, zooming, picking a patch, narrow and wide."""

import json
import re

import pytest

from hf_vicreg.report.report import write_report

pytestmark = pytest.mark.browser
WIDTHS = (390, 1280)


def show(browser, path, width):
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    wait = WebDriverWait(browser, 60)
    wait.until(lambda one: one.execute_script("return document.querySelectorAll('svg path.curve').length > 0"))
    return wait


def point(browser, element, x, y):
    """Move the pointer to a place in an element, as shares of its width and height."""
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    size = element.size
    offsets = int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"])
    return ActionChains(browser, duration=20).move_to_element_with_offset(element, *offsets)


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_and_has_no_error(browser, page_file, width):
    wait = show(browser, page_file, width)
    wait.until(lambda one: one.execute_script("return document.querySelectorAll('.heads canvas').length == 4"))
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth == {root}.clientWidth")
    outside = "return [...document.querySelectorAll('main *')].filter((one) => !one.closest('.wide, pre, svg')"
    outside += " && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 90))"
    assert browser.execute_script(outside) == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_pointing_at_a_curve_reads_it_and_dragging_zooms(browser, page_file, run, width):
    wait = show(browser, page_file, width)
    losses = {}
    for line in (run / "log.jsonl").read_text().splitlines()[:-1]:
        losses[json.loads(line)["step"]] = json.loads(line)["loss"]
    chart, number = all_of(browser, ".panel svg")[0], all_of(browser, ".panel .number")[0]
    point(browser, chart, 0.02, 0.5).perform()  # left of the first step
    wait.until(lambda one: number.text == f"{losses[1]:.3g}")
    point(browser, chart, 0.99, 0.5).perform()
    wait.until(lambda one: number.text == f"{losses[max(losses)]:.3g}")
    assert "step" in chart.text

    reset = browser.find_element("id", "reset-zoom")
    assert not reset.is_enabled()
    before = browser.execute_script("return document.querySelectorAll('.panel svg')[1].innerHTML")
    point(browser, chart, 0.2, 0.5).click_and_hold().move_by_offset(
        int(0.75 * chart.size["width"]), 0
    ).release().perform()
    wait.until(lambda one: reset.is_enabled())
    assert browser.execute_script("return document.querySelectorAll('.panel svg')[1].innerHTML") != before
    browser.execute_script("arguments[0].click()", reset)
    assert not reset.is_enabled()
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_picking_a_patch_shows_where_heads_look(browser, page_file, width):
    wait = show(browser, page_file, width)
    widget = browser.find_element("css selector", ".attention")
    image = widget.find_element("css selector", ".picker canvas")
    browser.execute_script("document.querySelectorAll('.heads canvas')[1].click()")  # layer 0, head 1
    point(browser, image, 0.9, 0.1).click().perform()
    wait.until(lambda one: widget.get_attribute("data-query") == "3")
    item = json.loads(re.search(r'id="data">(.*?)</script>', page_file.read_text(), re.DOTALL)[1])["attention"][0][
        "items"
    ][0]
    letters = item["levels"][0][item["queries"].index(3)]
    readout = widget.find_element("css selector", ".readout")
    for patch in (letters.index("."), letters.index("l")):
        point(browser, image, (patch % 4 + 0.5) / 4, (patch // 4 + 0.5) / 4).perform()
        wait.until(lambda one, at=patch: f"to row {at // 4}, column {at % 4}" in readout.text)
        shown = float(readout.get_attribute("data-value"))
        assert (shown == 0) == (letters[patch] == ".")
        assert ("forbidden" in readout.text) == (letters[patch] == ".")
    drawn = "return document.querySelectorAll('.heads canvas')[0].toDataURL()"
    before = browser.execute_script(drawn)
    image.send_keys("\ue012")  # the left arrow
    wait.until(lambda one: widget.get_attribute("data-query") == "2")
    assert browser.execute_script(drawn) != before
    browser.execute_script(
        "[...document.querySelectorAll('button')].find((one) => /CLS/.test(one.textContent)).click()"
    )
    assert widget.get_attribute("data-query") == "-1"
    assert browser.get_log("browser") == []


def test_pointing_at_the_map_shows_the_image_and_its_name(browser, page_file):
    wait = show(browser, page_file, 1280)
    content = json.loads(re.search(r'id="data">(.*?)</script>', page_file.read_text(), re.DOTALL)[1])["maps"][0]
    stage = browser.find_element("css selector", ".map canvas")
    x, y = content["maps"]["PCA"][5]
    width, height = stage.size["width"], stage.size["height"]
    place = (14 + x / 10_000 * (width - 28)) / width, (14 + y / 10_000 * (height - 28)) / height
    point(browser, stage, *place).perform()
    tip = browser.find_element("css selector", ".tip")
    wait.until(lambda one: tip.is_displayed() and tip.text in content["names"])
    chip = all_of(browser, ".classes button")[1]
    browser.execute_script("arguments[0].click()", chip)
    assert chip.get_attribute("aria-pressed") == "true"
    assert browser.get_log("browser") == []


def test_two_runs_work_side_by_side_in_the_dark(browser, run, images, tmp_path):
    path = write_report(run, run, data=str(images), output=tmp_path / "both.html")
    show(browser, path, 1280)
    ground = "return getComputedStyle(document.body).backgroundColor"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    light = browser.execute_script(ground)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert browser.execute_script(ground) != light
    assert len(all_of(browser, ".attention .picker canvas")) == 2
    left, right = (one.rect for one in all_of(browser, "#attention .run"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert browser.get_log("browser") == []


def test_the_page_runs_no_script_but_its_own(browser, page_file):
    show(browser, page_file, 1280)
    assert browser.execute_script("return document.querySelectorAll('[onclick], [onerror]').length") == 0
    planted = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.planted = 1\">');"
    planted += "const one = document.createElement('script'); one.textContent = 'window.planted = 1';"
    browser.execute_script(planted + "document.body.append(one)")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.execute_script("return window.planted === undefined")
    refused = browser.get_log("browser")
    assert refused
    assert all("Content Security Policy" in one["message"] for one in refused)
