"""The picture of a Space in the guide: the page of `cifar10_cpu`, with a photograph that a visitor has added.

Usage: python docs/space_pictures.py, with Chromium, its driver, selenium and scikit-learn installed. The photograph is
scikit-learn's flower.jpg (CC BY 2.0, vultilion).
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from hf_vicreg import weights
from hf_vicreg.publishing.space import stage_space
from hf_vicreg.publishing.staging import stage

PICTURE = Path(__file__).parent / "images" / "space.png"
COLOURS = 256  # of a picture, which is then a quarter as large
PORT = "7867"
SIZE = (1280, 1360)


def main() -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for one in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{one}")
    with tempfile.TemporaryDirectory() as folder:
        model, space = Path(folder) / "model", Path(folder) / "space"
        model.mkdir()
        space.mkdir()
        staged = stage(weights.FOLDER / "cifar10_cpu", model, repo="lab/cifar10_cpu")
        stage_space(staged, space, images=None, endpoint="https://huggingface.co")
        command = [sys.executable, "-m", "hub_space.app", "--model", str(model)]
        server = subprocess.Popen(command, cwd=space, env=os.environ | {"HOST": "127.0.0.1", "PORT": PORT})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            time.sleep(30)  # until the model is loaded
            _draw(browser)
        finally:
            browser.quit()
            server.terminate()


def _draw(browser: webdriver.Chrome) -> None:
    size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"http://127.0.0.1:{PORT}/")
    wait = WebDriverWait(browser, 120)
    wait.until(lambda one: one.execute_script("return document.body.dataset.ready"))
    flower = str(resources.files("sklearn.datasets.images") / "flower.jpg")
    browser.find_element("id", "file").send_keys(flower)
    wait.until(lambda one: one.execute_script("return document.body.dataset.chosen") == "flower.jpg")
    browser.execute_async_script("setTimeout(arguments[0], 500)")
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
