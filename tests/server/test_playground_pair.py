"""The playground of two models: side by side, each with its own figures."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from halfweave.runtime.model import Model, load_model
from playwright.sync_api import Browser, Page, Route, expect
from support.browser import (
    CHAT,
    answers,
    chromium,
    endless,
    figure,
    finished,
    model_of,
    opened,
    recorded,
    say,
    sent,
    settings,
    write,
    written,
)
from support.http_server import Live, idle, live_server, wait_until
from support.tiny import Tiny, pack_directory, save_tiny


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def two_models(long_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of a dense model and of the same in its 2:4 form, which can be made to last."""
    folder = tmp_path_factory.mktemp("two")
    dense = save_tiny(folder / "dense", Tiny(positions=8192))
    sparse = load_model(pack_directory(dense, folder / "sparse", "sparse24"))
    with live_server(long_model, name="dense", beside=sparse) as running:
        yield running


@pytest.fixture
def pair(browser: Browser, two_models: Live) -> Iterator[Page]:
    """The page of two models, side by side."""
    with opened(browser, two_models.url) as page:
        page.get_by_label("Side by side").check()
        yield page
    wait_until(lambda: idle(two_models))


def test_two_models_answer_side_by_side(pair: Page) -> None:
    dense, sparse = pair.get_by_role("region").all()
    expect(model_of(dense)).to_have_value("dense")
    expect(model_of(sparse)).to_have_value("sparse")
    documents = recorded(pair)
    settings(pair, temperature="0", max_tokens="12")
    say(pair, "What is kept?")
    for column in (dense, sparse):
        assert re.fullmatch(r"\d+ ms", figure(column, "ttft"))
        assert re.fullmatch(r"\d+\.\d", figure(column, "rate"))
    assert answers(dense).text_content() != answers(sparse).text_content()
    say(pair, "And now?")
    asked = {document["model"]: document["messages"] for document in documents[2:]}
    for column, name in ((dense, "dense"), (sparse, "sparse")):
        said = answers(column).first.text_content()
        assert asked[name][1] == {"role": "assistant", "content": said}


def test_both_stream_at_once_and_stop_together(pair: Page, two_models: Live) -> None:
    pair.route(CHAT, lambda route: route.continue_(post_data=endless(route)))
    write(pair, "Both")
    pair.keyboard.press("Control+Enter")
    for column in pair.get_by_role("region").all():
        expect(written(column)).to_have_text(re.compile(r"\d"))
    assert two_models.activity.in_flight == 2
    pair.keyboard.press("Escape")
    wait_until(lambda: idle(two_models), seconds=5)
    finished(pair)
    expect(pair.get_by_text("Stopped.")).to_have_count(2)


def test_one_models_refusal_leaves_the_other_its_answer(pair: Page) -> None:
    def refuse_one(route: Route) -> None:
        if sent(route)["model"] == "dense":
            route.fulfill(status=503, json={"error": {"message": "not today"}})
        else:
            route.fallback()

    pair.route(CHAT, refuse_one)
    settings(pair, max_tokens="4")
    say(pair, "Hi")
    first, second = pair.get_by_role("region").all()
    expect(first.locator(".problem")).to_have_text("not today")
    expect(second.locator(".problem")).to_have_count(0)
    assert re.fullmatch(r"\d+", figure(second, "written"))
    assert pair.locator("#prompt").input_value() == ""


def test_turning_the_comparison_on_and_off_begins_anew_and_keeps_the_first(pair: Page) -> None:
    settings(pair, max_tokens="4")
    say(pair, "Hi")
    pair.get_by_label("Side by side").uncheck()
    expect(answers(pair)).to_have_count(1)
    pair.get_by_label("Side by side").check()
    expect(pair.get_by_role("region")).to_have_count(2)
    expect(answers(pair)).to_have_count(0)
