"""Every panel of the explorer in headless Chromium, at the width of a desk and of a phone."""

import dataclasses
import shutil

import pytest

from hf_rgm.pages.exhibit import Exhibit
from tests.pages.tiny import tiny_exhibit

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from hf_rgm.explorer.app import build_app, launch_settings  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "${alert(1)} ${7 * 7}",
    "{{7 * 7}} {{#if 1}}",
    "`${alert(1)}`",
    '"><svg onload=alert(1)>',
]
TABS = {
    "Cluster": "#rgm-cluster-view",
    "Rows": "#rgm-rows-view",
    "What if": "#rgm-what-if-view",
    "All scores": "#rgm-heatmap-view",
    "About": "#rgm-facts-view",
}


@pytest.fixture(scope="module")
def served():
    """Addresses of the explorer with everything at hand, and of hostile attributions alone."""
    whole = tiny_exhibit()
    evil = dataclasses.replace(
        whole.result, cluster_names=EVIL, query_ids=[f"{EVIL[i % 6]} {i}" for i in range(12)], objective=EVIL[0]
    )
    texts = [{"text": EVIL[i % 6], "label": EVIL[0]} for i in range(48)]
    apps = {"whole": build_app(whole), "evil": build_app(Exhibit(evil, rows=texts, queries=texts[:12]), title=EVIL[0])}
    addresses = {}
    for name, app in apps.items():
        _, addresses[name], _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
    yield addresses
    for app in apps.values():
        app.close()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: `apt-get install chromium`)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def page(browser, request):
    """A page that must log no error, open no dialog and ask nobody but this machine."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(30_000)
    troubles = []
    page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda asked: asked.url.startswith(LOCAL) or troubles.append(asked.url))
    yield page
    page.close()
    assert troubles == []


LOCAL = ("http://127.0.0.1:", "http://localhost:", "data:", "blob:http://127.0.0.1:")


def open_tab(page, name):
    """Selects a tab, from the menu of those for which a narrow page has no room if need be."""
    page.get_by_role("tab", selected=True).wait_for()
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    page.wait_for_selector(f"{TABS[name]} h2", state="visible")


def choose(page, label, option):
    """Chooses by the keyboard alone."""
    page.get_by_role("combobox", name=label).focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(option)
    page.get_by_role("option", name=option, exact=False).first.wait_for()
    page.keyboard.press("Enter")


def in_sight(page):
    """Whether the banner lies within the window, wherever that is scrolled."""
    page.mouse.wheel(0, 5000)
    page.wait_for_timeout(100)
    box = page.locator("#rgm-banner").bounding_box()
    return box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"] / 2


def test_every_panel(served, page):
    page.goto(served["whole"])
    page.wait_for_selector("#rgm-query-view img")
    result = tiny_exhibit().result
    choose(page, "Query", "7 (margin")
    page.wait_for_selector("#rgm-query-view h2:has-text('Query 7')")
    first = page.locator("#rgm-clusters-view tbody tr").first.inner_text()
    assert result.cluster_names[result.scores[7].argmax()] in first
    strongest = result.cluster_names[abs(result.scores[7]).argmax()]
    assert strongest in page.locator("#rgm-cluster-view h2").inner_text()

    for tab in TABS:
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        assert in_sight(page), tab
    assert page.locator("#rgm-rows-view img").count() == 12
    assert page.locator("#rgm-heatmap-view img").count() == 1

    open_tab(page, "Cluster")
    choose(page, "Cluster", "class 2, first")
    page.wait_for_selector("#rgm-cluster-view h2:has-text('class 2, first half')")
    assert page.get_by_text("Synthetic samples").is_visible()

    open_tab(page, "What if")
    choose(page, "Clusters to remove", "class 1, first")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Predict without them").press("Enter")
    page.wait_for_selector("#rgm-what-if-view h2:has-text('Without class 1, first half')")
    assert "query 7" in page.locator("#rgm-what-if-view").inner_text()
    choose(page, "Query", "3 (margin")
    page.wait_for_selector("#rgm-what-if-view caption:has-text('query 3')")
    choose(page, "Query", "All 12")
    page.wait_for_selector("#rgm-query-view h2:has-text('All queries')")
    for missing in page.locator("img:not([alt]), img[alt='']").all():
        raise AssertionError(missing.evaluate("element => element.outerHTML.slice(0, 100)"))


def test_hostile_names_and_texts_are_shown_as_they_are(served, page):
    page.goto(served["evil"])
    page.wait_for_selector("#rgm-query-view blockquote")
    for tab in TABS:
        open_tab(page, tab)
    body = page.locator("body").text_content()
    for text in EVIL:
        assert text in body
    assert page.locator("img[src=x], svg[onload]").count() == 0
    assert page.get_by_role("button", name="Predict without them", include_hidden=True).is_disabled()
