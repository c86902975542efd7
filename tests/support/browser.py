"""The playground in a real browser: opened, filled in, and read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
CHAT, COMPLETIONS = "**/v1/chat/completions", "**/v1/**completions"
PATIENCE_MS = 30_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where there is none, unless that is a fault.

    For one module at a time: its event loop would be in the way of other tests' asyncio.run.
    """
    if CHROMIUM is None and os.environ.get("CI") != "true":
        pytest.skip("no Chromium here; Debian's package is chromium-headless-shell")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page in a fresh profile, which must never complain nor ask another host."""
    complaints: list[str] = []
    requests: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        yield page
        assert page.title() == "halfweave playground"
    # Chromium's own line about a status that a test provoked is no complaint of the page's.
    assert not [text for text in complaints if "Failed to load resource" not in text]
    assert not [asked for asked in requests if not asked.startswith((url, "data:"))]


def sent(route: Route) -> dict[str, Any]:
    """The JSON that the page posted."""
    document: dict[str, Any] = route.request.post_data_json
    return document


def endless(route: Route) -> str:
    """The document that the page posted, changed to go on after the model's own end."""
    return json.dumps({**sent(route), "max_tokens": 8000, "ignore_eos": True})


def recorded(page: Page) -> list[dict[str, Any]]:
    """The list to which every document that the page will post is added."""
    documents: list[dict[str, Any]] = []

    def record(route: Route) -> None:
        documents.append(sent(route))
        route.fallback()

    page.route(COMPLETIONS, record)
    return documents


def answered(*events: str) -> Callable[[Route], None]:
    """Answers a request with these events' data."""
    body = "".join(f"data: {event}\n\n" for event in events)
    return lambda route: route.fulfill(content_type="text/event-stream", body=body)


def piece(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})


def model_of(page: Page | Locator) -> Locator:
    return page.get_by_label("Model", exact=True)


def answers(page: Page | Locator) -> Locator:
    """The texts that models wrote in the mode that is shown."""
    return page.locator(".answer").filter(visible=True)


def settings(page: Page, **fields: str) -> None:
    """Fill in fields, each named by the id that its label is for."""
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)


def write(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)


def say(page: Page, text: str) -> None:
    """Send a text, and wait for the end of the answer."""
    write(page, text)
    page.get_by_role("button", name="Send").click()
    finished(page)


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def written(page: Page | Locator) -> Locator:
    """Where the tokens of the answer are counted."""
    return page.locator("[data-figure=written]")


def figure(page: Page | Locator, name: str) -> str:
    return page.locator(f"[data-figure={name}]").inner_text()
