"""A headless Chromium for the status page, and what its console says."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from harness import tool, wait_until

# What Chromium does by itself has nothing to look for on a network that may be closed.
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
).split()


class Browser:
    """One tab."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def forget(self) -> None:
        """An empty page of the usual size, and nothing said so far."""
        self.driver.get("about:blank")
        self.look(1280, 900)
        self.errors()

    def open(self, url: str) -> None:
        self.driver.get(url)

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """A screen of that size, with that preference."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of all that is found, as it is in the document: shown or not."""
        script = "return [...document.querySelectorAll(arguments[0])].map(it => it.textContent).join('\\n')"
        return self.driver.execute_script(script, selector)

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, selector: str, text: str) -> None:
        wait_until(f"{selector} shows {text!r}", lambda: text in self.text(selector))

    def is_shown(self, selector: str) -> bool:
        return self.find(selector).is_displayed()

    def errors(self) -> list[str]:
        """What the console has said since it was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def picture(self, file: Path) -> None:
        """The whole page, however long."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def running_browser() -> Iterator[Browser]:
    with TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = tool("chromium")
        for argument in [*QUIET, f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(tool("chromedriver")))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
