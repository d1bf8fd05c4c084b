"""The page in a real headless browser: the slider changes the picture, and the picture shows the routing."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pmod_cli import plots
from pmod_cli.prompts import Prompt
from pmod_cli.visualize.page import build_page
from pmod_cli.visualize.trace import trace
from tests.common import browser, visual_models

needs_browser = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
NASTY = "Is </script><script>window.bad = 1</script> \u2028 <b>bold</b>?"


@pytest.fixture(scope="module")
def page(llava_next, tmp_path_factory):
    image = visual_models.noise(150, 90)
    traced = trace(llava_next, Prompt("What?", (image,)))
    text = build_page(
        traced,
        image,
        model="tiny <model>",
        prompt=NASTY,
        answer="p-MoD says",
        baseline={"name": "dense twin", "answer": "dense says"},
    )
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text, encoding="utf-8")
    return path, traced


@pytest.fixture(scope="module")
def window(page):
    with browser.open_browser() as driver:
        driver.get(page[0].as_uri())
        wait_until_drawn(driver)
        yield driver


def wait_until_drawn(driver):
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, 20).until(lambda d: d.execute_script("return document.body.dataset.ready") == "yes")


def canvas(driver, number):
    """Pixels of a canvas, [height, width, 3], in [0, 1]."""
    url = driver.execute_script(f"return document.getElementById('view-{number}').toDataURL('image/png')")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.asarray(image.convert("RGB"), dtype=float) / 255


def slide(driver, keys):
    """Move the slider as a keyboard does."""
    from selenium.webdriver.common.by import By

    driver.find_element(By.ID, "layer").send_keys(keys)


def test_page_needs_nothing_else(page):
    text = page[0].read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "default-src 'none'" in text
    assert text.count("<script") == 2
    assert text.count("</script>") == 2


@needs_browser
def test_slider_changes_the_picture_to_the_layer_s_patches(window, page):
    from selenium.webdriver.common.keys import Keys

    traced = page[1]
    slide(window, Keys.HOME)
    original = [canvas(window, number) for number in range(2)]  # layer 0 is dense: nothing is dimmed
    previous = None
    for layer in range(1, traced.layers):
        slide(window, Keys.ARROW_RIGHT)
        assert window.execute_script("return state.layer") == layer
        shown = [canvas(window, number) for number in range(2)]
        if traced.ratios[layer] is not None:
            assert previous is None or not np.array_equal(shown[1], previous)
            previous = shown[1]
        for view, before, after in zip(traced.layout.views, original, shown, strict=True):
            height, width = before.shape[:2]
            for row in range(view.rows):
                for column in range(view.columns):
                    left, right = view.x[column : column + 2] * width / traced.layout.width
                    top, bottom = view.y[row : row + 2] * height / traced.layout.height
                    if right - left < 3 or bottom - top < 3:
                        continue
                    place = int((top + bottom) / 2), int((left + right) / 2)
                    kept = traced.kept[layer, view.tokens[row, column]]
                    share = 0 if kept else plots.DIM_SHARE
                    wanted = (1 - share) * before[place] + share * plots.DIM
                    assert np.abs(after[place] - wanted).max() < 0.02
    status = window.find_element("id", "status").text
    kept = int(traced.kept[-1].sum())
    assert (
        status
        == f"Layer 7 keeps {kept} of {traced.layout.tokens} vision tokens ({100 * kept / traced.layout.tokens:.0f} %)"
    )


@needs_browser
def test_answers_and_prompt(window):
    assert window.find_element("id", "prompt").text.split() == NASTY.split()
    assert "p-MoD says" in window.find_element("id", "answer-pmod").text
    assert "dense says" in window.find_element("id", "answer-dense").text
    assert window.execute_script("return window.bad") is None
    assert [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_browser
def test_hover_and_keyboard_tell_a_patch_s_weights(window, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    traced = page[1]
    view = traced.layout.views[1]
    slide(window, Keys.END)
    element = window.find_element("id", "view-1")
    box = element.rect
    x = (view.x[4] + view.x[5]) / 2 / traced.layout.width - 0.5
    y = (view.y[2] + view.y[3]) / 2 / traced.layout.height - 0.5
    window.execute_script("arguments[0].scrollIntoView()", element)
    ActionChains(window).move_to_element_with_offset(
        element, int(x * box["width"]), int(y * box["height"])
    ).perform()

    def told():
        return window.find_element("id", "patch").text + " " + window.find_element("id", "patch-now").text

    def weight(row, column):
        return f"router weight {traced.weights[7, view.tokens[row, column]]:.4f}"

    assert "Row 2, column 4" in told()
    assert weight(2, 4) in told()
    element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert "Row 3, column 5" in told()
    assert weight(3, 5) in told()
    dots = window.find_elements("css selector", "#weights .dot")
    token = view.tokens[3, 5]
    assert len(dots) == sum(ratio is not None for ratio in traced.ratios)
    assert [("kept" in dot.get_attribute("class").split()) for dot in dots] == traced.kept[2:, token].tolist()


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read_in_both_modes(page, dark):
    """Contrast of all text against the page is at least 4.5 (WCAG AA)."""
    with browser.open_browser(dark) as driver:
        driver.get(page[0].as_uri())
        wait_until_drawn(driver)
        pairs = driver.execute_script(
            "const colour = (node, name) => getComputedStyle(node)[name].match(/[0-9.]+/g).map(Number);"
            "return [...document.querySelectorAll('h1, p, q, label, h2, figcaption, #status, code')].map(node => {"
            "  let ground = node;"
            "  while (colour(ground, 'backgroundColor')[3] === 0) ground = ground.parentElement;"
            "  return [colour(node, 'color').slice(0, 3), colour(ground, 'backgroundColor').slice(0, 3)];"
            "});"
        )
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    assert len(pairs) > 10
    for text, ground in pairs:
        assert contrast(text, ground) >= 4.5


def contrast(first, second):
    lightness = sorted(luminance(colour) for colour in (first, second))
    return (lightness[1] + 0.05) / (lightness[0] + 0.05)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
