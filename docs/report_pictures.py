"""The pictures of a report in the guide: parts of a run's page, as a browser shows them.

Usage: python docs/report_pictures.py RUN, with Chromium, its driver and selenium installed. RUN is a run of the recipe
`digits`, as `make demo` leaves it in runs/demo.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains

from hf_vicreg.report.report import write_report

IMAGES = Path(__file__).parent / "images"
COLOURS = 256  # of a picture, which is then a quarter as large


def main() -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for one in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{one}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(sys.argv[1], output=Path(folder) / "report.html")
        try:
            _draw(browser, page)
        finally:
            browser.quit()


def _draw(browser: webdriver.Chrome, page: Path) -> None:
    _open(browser, page, 1280, 1000)
    chart = browser.find_elements("css selector", ".panel svg")[1]
    ActionChains(browser).move_to_element(chart).perform()
    browser.execute_script("scrollTo(0, 0)")
    _save(browser, IMAGES / "report.png")
    _open(browser, page, 390, 1000)
    browser.execute_script("document.querySelectorAll('.attention .image')[4].click()")  # the first at twice the size
    browser.execute_script("document.getElementById('attention').scrollIntoView({behavior: 'instant'})")
    _save(browser, IMAGES / "report_attention.png")


def _open(browser: webdriver.Chrome, page: Path, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


def _save(browser: webdriver.Chrome, path: Path) -> None:
    browser.execute_async_script("setTimeout(arguments[0], 500)")  # what is drawn after a change of size
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
