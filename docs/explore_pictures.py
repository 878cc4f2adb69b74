"""The picture of an explorer in the guide: its page as a browser shows it.

Usage: python docs/explore_pictures.py IMAGES MODEL [IMAGE], with Chromium, its driver and selenium installed. IMAGE is
the row that is clicked.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

PICTURE = Path(__file__).parent / "images" / "explore.png"
COLOURS = 256  # of a picture, which is then a quarter as large


def main() -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for one in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{one}")
    command = [sys.executable, "-m", "hf_vicreg.cli", "explore", *sys.argv[1:3], "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            _draw(browser, found[0], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
        finally:
            browser.quit()
    finally:
        server.terminate()


def _draw(browser: webdriver.Chrome, address: str, row: int) -> None:
    size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
    WebDriverWait(browser, 120).until(lambda one: one.execute_script("return document.body.dataset.ready"))
    browser.execute_script("app.pick(arguments[0])", row)
    browser.execute_async_script("setTimeout(arguments[0], 3000)")  # until the images are there
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
