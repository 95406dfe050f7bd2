"""The page in a real browser, headless: no error, ink in every figure, nothing wider than a phone, light and dark."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from small_run import write_run

from ensdistill.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium (.ci/run does)")

LOOK = """() => ({
    wide: [document.documentElement.scrollWidth, innerWidth],
    beyond: [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, pre, .hidden')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80)),
    unnamed: [...document.querySelectorAll('svg, img')].filter(e => e.tagName === 'IMG' ? !e.alt || !e.naturalWidth
        : e.getAttribute('role') !== 'img' || !e.getAttribute('aria-labelledby').split(' ')
            .every(id => document.getElementById(id)?.textContent.trim())).map(e => e.outerHTML.slice(0, 80)),
    small: Math.min(...[...document.querySelectorAll('svg text')].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)),
    paper: getComputedStyle(document.body).backgroundColor,
    figures: document.querySelectorAll('svg').length,
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    names = ["<b>bold</b>", "a name that is far longer than any figure has room for", *map(str, range(6))]
    methods = ("ce", "kd", "latentbe+tdiv-sdiv", "hydra+ods")
    whole = write_run(folder / "whole", methods=methods, class_names=names, K=8, side=64).path
    other = write_run(folder / "other", config={"tau": 1.0}).path
    write_report([whole], folder / "report.html")
    write_report([whole, other], folder / "comparison.html")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("report", 390, "light"),
        ("report", 390, "dark"),
        ("comparison", 390, "light"),
    ],
)
def test_in_a_browser(pages, browser, name, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble, asked = [], []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((pages / f"{name}.html").as_uri())
    found = page.evaluate(LOOK)
    assert trouble == [] and [url for url in asked if not url.startswith("data:")] == [page.url]
    assert found["wide"] == [width, width] and found["beyond"] == [] and found["unnamed"] == []
    assert found["small"] >= 9, "text of figures is too small to read"
    assert found["figures"] >= (3 if name == "comparison" else 15)
    paper = np.array([int(part) for part in found["paper"][4:-1].split(",")])
    assert (paper.mean() > 128) == (scheme == "light")
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")).astype(int)
    for place, figure in enumerate(page.query_selector_all("svg")):
        box = figure.bounding_box()
        x, y = int(box["x"]), int(box["y"])
        pixels = screen[y : y + int(box["height"]), x : x + int(box["width"])]
        ink = np.abs(pixels - paper).max(axis=-1)
        assert (ink > 60).mean() > 0.01, f"figure {place} is empty"
        coloured = pixels.max(axis=-1) - pixels.min(axis=-1) > 60
        assert coloured.mean() > 0.0005, f"figure {place} shows no network"
    page.close()
