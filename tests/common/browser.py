"""A real headless browser, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def missing() -> str | None:
    """Why there is no browser to test with; None if there is one."""
    if not any(map(shutil.which, BROWSERS)):
        return "no browser: install chromium and chromium-driver (apt-get install chromium chromium-driver)"
    if not shutil.which("chromedriver"):
        return "no chromedriver: install it (apt-get install chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install selenium"
    return None


@contextmanager
def open_browser(dark: bool = False) -> Iterator[Any]:
    """A window of 1200 x 1000 that reaches no network."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, BROWSERS) if path)
    arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1200,1000",
    ]
    if dark:
        arguments.append("--blink-settings=preferredColorScheme=0")
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
