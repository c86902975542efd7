"""The page at GET /, as a real browser shows it and a person uses it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from halfweave.runtime.model import Model
from halfweave.server.settings import ServerSettings
from playwright.sync_api import Browser, Page, Route, expect
from support.browser import (
    CHAT,
    COMPLETIONS,
    answered,
    answers,
    chromium,
    endless,
    figure,
    finished,
    model_of,
    opened,
    piece,
    recorded,
    say,
    sent,
    settings,
    write,
    written,
)
from support.http_server import Live, idle, live_server, wait_until

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
WIDE, NARROW = (1280, 820), (360, 740)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser, live: Live) -> Iterator[Page]:
    """The page of the tiny model's server, ready to be used."""
    with opened(browser, live.url) as page:
        expect(model_of(page)).to_have_value(live.model)
        yield page


@pytest.fixture
def lasting(browser: Browser, slow: Live) -> Iterator[Page]:
    """The page of a server whose answers go on until they are stopped."""
    with opened(browser, slow.url) as page:
        expect(model_of(page)).to_have_value(slow.model)
        page.route(COMPLETIONS, lambda route: route.continue_(post_data=endless(route)))
        yield page


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go; HALFWEAVE_TEST_ARTEFACTS names a place that outlives the run."""
    named = os.environ.get("HALFWEAVE_TEST_ARTEFACTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- the file and its headers


def test_the_page_is_one_small_file_that_asks_for_no_other(live: Live) -> None:
    answer = live.get("/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.body) < 40_000
    text = answer.body.decode()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(""", text)
    assert "/" not in live.get("/openapi.json").json["paths"]


def test_the_page_may_run_its_own_script_and_nothing_else(live: Live) -> None:
    headers = live.get("/").headers
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[kind])
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


def test_only_the_page_itself_is_served(live: Live) -> None:
    for path in ("/playground.html", "/playground.py", "/static/", "/..%2fplayground.py"):
        assert live.get(path).status == 404


# ---- talking to a model


def test_a_chat_streams_what_the_api_says_with_its_figures(page: Page, live: Live) -> None:
    settings(page, temperature="0", max_tokens="12")
    say(page, "What is kept?")
    turns = [{"role": "user", "content": "What is kept?"}]
    told = live.chat(messages=turns, temperature=0, max_tokens=12).json
    assert answers(page).text_content() == told["choices"][0]["message"]["content"]
    assert re.fullmatch(r"\d+ ms", figure(page, "ttft"))
    assert re.fullmatch(r"\d+\.\d", figure(page, "rate"))
    assert figure(page, "written") == str(told["usage"]["completion_tokens"])
    assert figure(page, "prompt").startswith(f"{told['usage']['prompt_tokens']} (")


def test_a_conversation_is_sent_whole_with_the_system_prompt(page: Page) -> None:
    documents = recorded(page)
    settings(page, system="Be brief.", temperature="0", max_tokens="4")
    say(page, "One")
    first = answers(page).text_content()
    say(page, "Two")
    assert documents[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Two"},
    ]
    page.get_by_role("button", name="Clear").click()
    expect(answers(page)).to_have_count(0)
    say(page, "Three")
    assert len(documents[2]["messages"]) == 2


def test_a_completion_goes_on_from_its_prompt(page: Page, live: Live) -> None:
    page.get_by_text("Completion").click()
    expect(page.get_by_label("System prompt")).to_be_hidden()
    settings(page, temperature="0", max_tokens="12")
    say(page, "The quick")
    told = live.complete(prompt="The quick", temperature=0, max_tokens=12).json
    assert answers(page).text_content() == "The quick" + told["choices"][0]["text"]
    assert figure(page, "written") == str(told["usage"]["completion_tokens"])
    assert page.locator("#prompt").input_value() == "The quick"


def test_each_mode_keeps_what_it_shows(page: Page) -> None:
    settings(page, max_tokens="4")
    say(page, "Hello")
    chat = answers(page).text_content()
    page.get_by_text("Completion").click()
    expect(answers(page)).to_have_count(0)
    page.get_by_text("Chat", exact=True).click()
    assert answers(page).text_content() == chat


def test_the_knobs_are_sent_as_they_stand(page: Page) -> None:
    documents: list[dict[str, Any]] = []

    def record(route: Route) -> None:
        documents.append(sent(route))
        answered(piece("ok"), "[DONE]")(route)

    page.route(CHAT, record)
    say(page, "Hi")
    plain = documents[0]
    assert (plain["temperature"], plain["top_p"], plain["max_tokens"]) == (0.7, 0.95, 256)
    assert plain["stream_options"] == {"include_usage": True}
    assert not {"seed", "stop"} & set(plain)
    numbers = {
        "temperature": 1.25, "top_p": 0.5, "top_k": 40, "min_p": 0.05, "seed": -7,
        "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25,
        "max_tokens": 9,
    }  # fmt: skip
    settings(page, stops="END\n\\n\\n\n\\\\n", **{k: str(v) for k, v in numbers.items()})
    say(page, "Hi")
    assert {name: documents[1][name] for name in numbers} == numbers
    assert documents[1]["stop"] == ["END", "\n\n", "\\n"]
    settings(page, temperature="")
    say(page, "Hi")
    assert "temperature" not in documents[2]
    page.get_by_role("button", name="Defaults").click()
    say(page, "Hi")
    assert {**documents[3], "messages": []} == {**plain, "messages": []}


# ---- stopping


def begin_lasting(page: Page, slow: Live, text: str = "Never end") -> None:
    write(page, text)
    page.keyboard.press("Control+Enter")
    expect(written(page)).to_have_text(re.compile(r"\d"))
    assert slow.engine.stats().running == 1


def test_figures_move_while_the_answer_streams(lasting: Page, slow: Live) -> None:
    begin_lasting(lasting, slow)
    expect(lasting.locator("[data-figure=ttft]")).to_have_text(re.compile(r"^\d+ ms$"))
    expect(lasting.locator("[data-figure=rate]")).to_have_text(re.compile(r"^≈ \d+\.\d$"))
    before = written(lasting).inner_text()
    assert before.startswith("≈ ")
    expect(written(lasting)).not_to_have_text(before)
    expect(lasting.get_by_role("log")).to_have_attribute("aria-busy", "true")
    lasting.get_by_role("button", name="Stop").click()


@pytest.mark.parametrize("mode", ["Chat", "Completion"])
def test_stop_ends_the_request_on_the_server(lasting: Page, slow: Live, mode: str) -> None:
    lasting.get_by_text(mode, exact=True).click()
    begin_lasting(lasting, slow)
    lasting.get_by_role("button", name="Stop").click()
    wait_until(lambda: idle(slow), seconds=5)
    finished(lasting)
    expect(lasting.get_by_text("Stopped.")).to_be_visible()
    expect(lasting.get_by_role("button", name="Stop")).to_be_hidden()


def test_escape_stops_and_what_was_said_stays_in_the_conversation(
    lasting: Page, slow: Live
) -> None:
    begin_lasting(lasting, slow)
    lasting.keyboard.press("Escape")
    wait_until(lambda: idle(slow), seconds=5)
    finished(lasting)
    said = answers(lasting).text_content()
    assert said
    documents = recorded(lasting)
    with lasting.expect_request(CHAT):
        begin_lasting(lasting, slow, "Go on")
    assert documents[0]["messages"][1:] == [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Go on"},
    ]
    lasting.keyboard.press("Escape")
    finished(lasting)


def test_closing_the_tab_ends_the_request_too(browser: Browser, slow: Live) -> None:
    with opened(browser, slow.url) as page:
        expect(model_of(page)).to_have_value(slow.model)
        page.route(CHAT, lambda route: route.continue_(post_data=endless(route)))
        begin_lasting(page, slow)
    wait_until(lambda: idle(slow), seconds=5)


# ---- what goes wrong


def test_a_refusal_is_shown_in_words_and_the_question_comes_back(page: Page) -> None:
    question = "riddle " * 500
    say(page, question)
    expect(page.locator(".problem").filter(visible=True)).to_contain_text("the context has 256")
    assert page.locator("#prompt").input_value() == question
    documents = recorded(page)
    settings(page, max_tokens="2")
    say(page, "Short")
    assert [turn["content"] for turn in documents[0]["messages"]] == ["Short"]
    expect(page.locator(".problem").filter(visible=True)).to_have_count(0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "2.5", "Temperature must be a number from 0 to 2."),
        ("top_k", "1.5", "Top k must be a whole number from 0 to 2147483647."),
        ("max_tokens", "0", "Max tokens must be a whole number from 1 to 2147483647."),
        ("repetition_penalty", "0", "Repetition must be a number from 0.01 to 2."),
        ("stops", "a\nb\nc\nd\ne", "There may be at most 4 stop strings."),
        ("stops", "x" * 1001, "A stop string may have 1000 characters."),
        ("key", "a b", "The API key has a character that no key can have."),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_sent(
    page: Page, field: str, value: str, words: str
) -> None:
    documents = recorded(page)
    settings(page, **{field: value})
    write(page, "Hi")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_have_text(words)
    expect(page.locator(f"#{field}")).to_be_focused()
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    assert not documents


def test_an_empty_message_is_not_sent(page: Page) -> None:
    documents = recorded(page)
    write(page, " \n ")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_have_text("Write something first.")
    assert not documents


ERROR = json.dumps({"error": {"message": "the engine has stopped"}})


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((piece("Half"), ERROR, "[DONE]"), "the engine has stopped"),
        ((piece("Half"),), "The answer broke off before its end."),
        ((piece("Half"), "{"), "The server sent something that is no answer."),
    ],
)
def test_a_stream_that_fails_says_so_below_what_came(
    page: Page, events: tuple[str, ...], words: str
) -> None:
    page.route(CHAT, answered(*events))
    say(page, "Hi")
    assert answers(page).text_content() == "Half"
    expect(page.locator("article .problem")).to_have_text(words)


def test_a_page_of_a_proxy_is_not_taken_for_an_answer(page: Page) -> None:
    page.route(CHAT, lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    say(page, "Hi")
    expect(page.locator("article .problem")).to_have_text("The server answered with status 502.")


def test_a_server_that_is_gone_is_said_to_be(page: Page) -> None:
    page.route(CHAT, lambda route: route.abort("connectionrefused"))
    say(page, "Hi")
    expect(page.locator("article .problem")).to_contain_text("The server does not answer.")


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser: Browser, live: Live) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "a key is needed"}})

    with opened(browser, live.url) as page:
        page.route("**/v1/**", guard)
        page.reload()
        expect(page.get_by_role("alert")).to_have_text("a key is needed")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.insert_text("secret")
        page.keyboard.press("Enter")
        expect(model_of(page)).to_have_value(live.model)
        expect(page.locator("#notice")).to_be_empty()
        settings(page, max_tokens="2")
        say(page, "Hi")
        expect(page.locator(".problem").filter(visible=True)).to_have_count(0)
        page.reload()
        expect(model_of(page)).to_have_value(live.model)
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_a_key_given_as_the_browsers_password_is_enough(
    browser: Browser, served_model: Model
) -> None:
    password: Any = {"username": "anybody", "password": "secret"}
    with (
        live_server(served_model, ServerSettings(api_keys=("secret",))) as guarded,
        opened(browser, guarded.url, http_credentials=password) as page,
    ):
        expect(model_of(page)).to_have_value(guarded.model)
        settings(page, max_tokens="2")
        say(page, "Hi")
        expect(page.locator(".problem").filter(visible=True)).to_have_count(0)
        settings(page, key="wrong")
        say(page, "Hi")
        expect(page.get_by_role("alert")).to_have_text("a valid API key is needed")


# ---- hostile text


def test_markup_from_the_user_or_the_model_stays_text(page: Page) -> None:
    page.route(CHAT, answered(piece(HOSTILE), "[DONE]"))
    say(page, HOSTILE)
    assert answers(page).text_content() == HOSTILE
    assert page.locator(".said").text_content() == HOSTILE
    assert page.locator("article img, article script").count() == 0


def test_markup_in_an_error_stays_text(page: Page) -> None:
    refusal = {"error": {"message": HOSTILE}}
    page.route(CHAT, lambda route: route.fulfill(status=400, json=refusal))
    say(page, "Hi")
    expect(page.locator("article .problem")).to_have_text(HOSTILE)


def test_markup_in_a_models_name_stays_text(browser: Browser, served_model: Model) -> None:
    with (
        live_server(served_model, name=HOSTILE) as hostile,
        opened(browser, hostile.url) as page,
    ):
        expect(model_of(page)).to_have_value(HOSTILE)
        settings(page, max_tokens="2")
        say(page, "Hi")
        assert page.locator(".speaker").text_content() == HOSTILE
        assert page.locator("img").count() == 0


# ---- the reader of streams

READ = """async ([bytes, size]) => {
  const stream = new ReadableStream({ start(controller) {
    for (let i = 0; i < bytes.length; i += size) {
      controller.enqueue(new Uint8Array(bytes.slice(i, i + size)));
    }
    controller.close();
  } });
  const read = [];
  for await (const data of events(stream)) read.push(data);
  return read;
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_are_read_wherever_the_network_cuts_them(page: Page, end: str) -> None:
    lines = (
        ": ping",
        "",
        "data: zwölf 🧵",
        "",
        "event: x",
        "data:one",
        "data:  two",
        "",
        "id: 1",
        "",
    )
    sent = list(end.join((*lines, "")).encode())
    for size in (1, 2, 3, 7, len(sent)):
        # A \r at the very end could be half of a \r\n.
        assert page.evaluate(READ, [sent, size]) == ["zwölf 🧵", "one\n two"]


# ---- for everyone


def test_one_model_is_not_compared(page: Page) -> None:
    expect(page.get_by_label("Side by side")).to_be_hidden()
    expect(page.get_by_role("region")).to_have_count(1)


def test_every_field_has_a_label_and_answers_are_announced(page: Page) -> None:
    unnamed = """[...document.querySelectorAll("input, textarea, select, button")]
      .filter((field) => !field.labels?.length && !field.ariaLabel && !field.textContent.trim())
      .map((field) => field.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert page.get_by_role("log").count() == 1
    expect(page.get_by_role("log")).to_have_accessible_name("Conversation")


def test_the_keyboard_reaches_everything_that_is_shown(page: Page) -> None:
    wanted = {"prompt", "clear", "send", "system", "temperature", "stops", "key"}
    seen: set[str] = set()
    page.locator("#prompt").focus()
    for _ in range(40):
        seen.add(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert wanted <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits_wide_and_narrow_by_day_and_by_night(
    browser: Browser, live: Live, artefacts: Path, scheme: Any, size: tuple[int, int]
) -> None:
    viewport: Any = {"width": size[0], "height": size[1]}
    with opened(browser, live.url, viewport=viewport, color_scheme=scheme) as page:
        expect(model_of(page)).to_have_value(live.model)
        page.route(CHAT, answered(piece("Two of every four weights. " * 12 + "x" * 300), "[DONE]"))
        say(page, "What is kept?")
        picture = artefacts / f"playground-{size[0]}-{scheme}.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size > 10_000
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert page.evaluate("document.documentElement.scrollHeight") <= size[1]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        darkness = sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 3 * 128
        assert darkness == (scheme == "dark")


def test_on_a_narrow_screen_the_settings_open_over_the_page(browser: Browser, live: Live) -> None:
    with opened(browser, live.url, viewport={"width": 360, "height": 740}) as page:
        expect(page.get_by_label("Temperature")).to_be_hidden()
        button = page.get_by_role("button", name="Settings")
        button.click()
        expect(button).to_have_attribute("aria-expanded", "true")
        settings(page, temperature="9")
        page.keyboard.press("Escape")
        expect(page.get_by_label("Temperature")).to_be_hidden()
        write(page, "Hi")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.get_by_label("Temperature")).to_be_focused()
