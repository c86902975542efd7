"""The report as a browser shows it: every chart drawn and legible, nothing asked from elsewhere."""

from __future__ import annotations

import builtins
import io
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import HalfweaveError
from halfweave.report.documents import KINDS, document_path
from halfweave.report.gather import gather
from halfweave.report.page import write_report
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from support.browser import chromium
from support.command import QUICK, Command, assert_error
from support.measured import FORMATS, save_measured
from support.tiny import edit_json

CHARTS = ("pareto", "errors", "one-token", "roofline", "batches", "latency", "pattern")
# Axes of each chart that begin at a number 0 which is written.
ZEROS = dict(zip(CHARTS, (8, 1, 1, 5, 4, 12, 3), strict=True))
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
STRANGE = "$\\frac{1}{0$ & \x07\x1b[31m \u202e " + "long" * 40
LEAST_COLORS = 20  # a blank picture has one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def measured(pruned: Path) -> Path:
    """A pruned model with all that can be measured of it."""
    save_measured(pruned)
    return pruned


@contextmanager
def opened(browser: Browser, file: Path, **options: Any) -> Iterator[Page]:
    """The page from the disk, which must never complain nor ask for anything else."""
    complaints: list[str] = []
    requests: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.resolve().as_uri())
        yield page
    assert not complaints
    assert [url for url in requests if not url.startswith("data:")] == [file.resolve().as_uri()]


def chart(page: Page, name: str) -> Locator:
    return page.locator(f"section#{name} svg")


def words(drawn: Locator) -> list[dict[str, Any]]:
    """Every text of a chart with its place on the screen, seen from the chart's corner."""
    found: list[dict[str, Any]] = drawn.evaluate(
        """svg => [...svg.querySelectorAll("text")].map(text => {
            const [all, box] = [svg.getBoundingClientRect(), text.getBoundingClientRect()];
            return {text: text.textContent, x: box.x - all.x, y: box.y - all.y,
                    right: all.right - box.right, bottom: all.bottom - box.bottom,
                    width: box.width, height: box.height};
        })"""
    )
    return found


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Square pixels that two texts share."""
    width = min(one["x"] + one["width"], other["x"] + other["width"]) - max(one["x"], other["x"])
    height = min(one["y"] + one["height"], other["y"] + other["height"]) - max(one["y"], other["y"])
    return float(max(width, 0) * max(height, 0))


def colors(picture: bytes) -> int:
    """Distinct colours of a PNG."""
    found = Image.open(io.BytesIO(picture)).convert("RGB").getcolors(maxcolors=2**24)
    assert found is not None
    return len(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_legible(browser: Browser, measured: Path, scheme: Any) -> None:
    write_report(measured)
    wide = {"width": 1180, "height": 900}
    with opened(browser, measured / "report.html", viewport=wide, color_scheme=scheme) as page:
        for name in CHARTS:
            drawn = chart(page, name)
            box = drawn.bounding_box()
            assert box is not None and box["width"] > 500 and box["height"] > 200
            texts = words(drawn)
            for text in texts:
                assert min(text["x"], text["y"], text["right"], text["bottom"]) > -1, (name, text)
                assert text["width"] > 0 and min(text["width"], text["height"]) > 7, (name, text)
            clashes = [
                (one["text"], other["text"])
                for one, other in combinations(texts, 2)
                if overlap(one, other) > 12
            ]
            assert not clashes, name
            assert [text["text"] for text in texts].count("0") >= ZEROS[name], name
            assert colors(drawn.screenshot()) > LEAST_COLORS
            assert drawn.get_attribute("role") == "img"
            assert page.locator(f"#{name}-title").text_content()
            assert page.locator(f"section#{name} tbody tr").count() > 0
        shade = page.locator("svg text").first.evaluate(
            "e => +getComputedStyle(e).fill.match(/\\d+/)[0]"
        )
        assert (shade > 150) == (scheme == "dark")


def test_charts_say_units_numbers_and_spread(browser: Browser, measured: Path) -> None:
    write_report(measured)
    with opened(browser, measured / "report.html") as page:
        said = {name: {text["text"] for text in words(chart(page, name))} for name in CHARTS}
        captions = {n: page.locator(f"section#{n} figcaption").inner_text() for n in CHARTS}
    assert {"weight files, MiB", "decoded tokens/s, one request"} <= said["pareto"]
    assert {"dense", "2:4", "2:4+int4", "int4"} <= said["pareto"]
    assert {"TTFT, ms", "TPOT, ms", "output tokens/s", "p50", "p99"} <= said["latency"]
    assert any(text.startswith("dashed: ideal, what memory gives") for text in said["one-token"])
    assert {"dense", "2:4", "2:4+int4", "int4", "sparse24_int4"} <= said["roofline"] | said[
        "latency"
    ]
    assert "ideal of the format" in captions["roofline"]
    assert "least and the greatest of n = 7" in captions["roofline"]
    assert "n = 4088 tokens" in captions["pareto"] and "of 5 repetitions" in captions["pareto"]
    assert "(n = 32)" in captions["errors"]
    assert all("A processor" in captions[name] for name in ("pareto", "roofline", "latency"))


def test_batches_are_drawn_beside_dense_with_their_numbers(
    browser: Browser, measured: Path
) -> None:
    def one_model_had_no_room(document: dict[str, Any]) -> None:
        document["models"][2]["batches"].pop()

    edit_json(document_path(measured, "offline"), one_model_had_no_room)
    write_report(measured)
    with opened(browser, measured / "report.html") as page:
        said = {text["text"] for text in words(chart(page, "batches"))}
        cells = page.locator("section#batches tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
        )
        caption = page.locator("section#batches figcaption").inner_text()
    assert {"prefill, tokens/s", "decode, tokens/s", "requests at once"} <= said
    assert {"dense", "2:4", "2:4+int4", "int4", "1", "2", "4", "8", "16"} <= said
    assert "greatest of n = 5. Measured 2026-11-27 on A processor" in caption
    assert [row[1] for row in cells] == ["1", "2", "4", "8", "16"] * 2 + ["1", "2", "4", "8"] + [
        *("1", "2", "4", "8", "16")
    ]
    assert {row[4] for row in cells if row[0] == "dense"} == {"1.00x"}
    assert {row[4] for row in cells if row[0] == "2:4+int4"} == {"5.72x"}  # 543 over 95


@pytest.mark.parametrize(
    "batches", [[], [{"batch": 3}], [{"batch": 64, "decode_tokens_per_s": 7.5}]]
)
def test_batches_that_say_little_are_drawn_as_far_as_they_do(
    browser: Browser, measured: Path, batches: list[Any]
) -> None:
    def changed(document: dict[str, Any]) -> None:
        for model in document["models"]:
            model["batches"] = batches

    edit_json(document_path(measured, "offline"), changed)
    result = write_report(measured)
    drawn = "Requests side by side" in result.drawn
    assert drawn == bool(batches)
    with opened(browser, measured / "report.html") as page:
        expect(page.locator("section#batches svg")).to_have_count(int(drawn))


def test_percentiles_that_are_missing_hide_no_line(browser: Browser, measured: Path) -> None:
    """Of too few requests there is a median, and no 99th percentile."""

    def few(document: dict[str, Any]) -> None:
        for point in document["points"]:
            for name in ("ttft_ms", "tpot_ms"):
                point[name].update(p99=None)

    edit_json(document_path(measured, "serve"), few)
    write_report(measured)
    with opened(browser, measured / "report.html") as page:
        said = {text["text"] for text in words(chart(page, "latency"))}
    assert {"p50", "p90"} <= said
    assert not {"p99", "not measured"} & said


def test_a_command_to_type_holds_no_other_one(measured: Path) -> None:
    """Names of parents come with the weights, and paths have blanks."""

    def spoil(manifest: dict[str, Any]) -> None:
        manifest["provenance"]["base"]["name"] = "x; rm -rf ~ #"

    edit_json(measured / "halfweave.json", spoil)
    spaced = measured.rename(measured.parent / "with blanks")
    told = shlex.split(gather_command("serve", spaced))
    assert told == ["halfweave", "bench", str(spaced), "serve", "--against", "x; rm -rf ~ #"]


def test_the_kept_weights_are_two_of_every_four(browser: Browser, measured: Path) -> None:
    corner = gather(measured).corner
    assert corner is not None
    assert corner.kept.view(len(corner.kept), -1, 4).sum(-1).unique().tolist() == [2]
    assert bool((corner.weights[~corner.kept] == 0).all())
    write_report(measured)
    with opened(browser, measured / "report.html") as page:
        cells = page.locator("section#pattern tbody td:nth-child(2)").all_inner_texts()
    assert sum(map(int, cells)) == corner.kept.numel() // 4


def test_errors_are_those_of_the_manifest(
    browser: Browser, halfweave: Command, measured: Path
) -> None:
    found = halfweave("inspect", measured, "--json").document["result"]["linears"]
    wanted = [f"{row['relative_error']:.4f}" for row in found]
    write_report(measured)
    with opened(browser, measured / "report.html") as page:
        cells = page.locator("section#errors tbody td:not(:first-child)").all_inner_texts()
    assert sorted(cells) == sorted(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_document_leaves_the_others_and_says_how_to_measure_it(
    browser: Browser, measured: Path, kind: str
) -> None:
    document_path(measured, kind).unlink()
    result = write_report(measured)
    gone = {
        "kernel": {"one-token", "roofline"},
        "serve": {"latency"},
        "offline": {"batches"},
    }.get(kind, set())
    assert {Path(file).stem for file in result.pictures} == set(CHARTS) - gone
    with opened(browser, measured / "report.html") as page:
        for name in gone:
            told = page.locator(f"section#{name} .absent").inner_text()
            assert told == f"not measured. To measure it: {gather_command(kind, measured)}"
        assert page.locator("section#tasks").count() == (0 if kind == "eval" else 1)


def gather_command(kind: str, directory: Path) -> str:
    from halfweave.report.gather import command

    return command(kind, gather(directory))


def test_a_dense_model_without_measurements_has_a_page_too(
    browser: Browser, copy_of: Callable[[Path], Path], tiny_model: Path
) -> None:
    directory = copy_of(tiny_model)
    result = write_report(directory)
    assert not result.pictures
    assert len(result.absent) == len(CHARTS)
    with opened(browser, directory / "report.html") as page:
        expect(page.locator(".absent")).to_have_count(len(CHARTS))


def test_hostile_names_are_words_and_nothing_else(browser: Browser, measured: Path) -> None:
    def spoil(document: dict[str, Any]) -> None:
        document["model"]["name"] = document["model"]["path"] = HOSTILE
        document["notes"] = [HOSTILE, STRANGE]
        document["command"] = ["halfweave", HOSTILE]
        document["hardware"]["cpu"] = HOSTILE
        for row in document.get("rows", []):
            row["format"] = row["format"] if row["format"] == "dense" else STRANGE
            row["kernel"] = HOSTILE
        for at, model in enumerate(document.get("models", [])):
            model["name"] = f"{HOSTILE if at % 2 else STRANGE}{at}"
            model["kernels"] = {STRANGE: HOSTILE}

    for kind in KINDS:
        edit_json(document_path(measured, kind), spoil)
    write_report(measured)
    with opened(browser, measured / "report.html") as page:
        assert page.title() == f"{measured.name}: what was won and lost"
        assert page.locator("script, img, iframe, object").count() == 0
        assert HOSTILE in page.locator("section#measurements").inner_text()
        expect(page.locator("svg")).to_have_count(len(CHARTS))


def test_other_models_are_compared_on_the_same_text_only(
    browser: Browser, halfweave: Command, measured: Path, tiny_model: Path, tmp_path: Path
) -> None:
    others = []
    for at, digest in enumerate(("ab" * 32, "cd" * 32)):
        others.append(tmp_path / f"other-{at}")
        assert halfweave("prune", tiny_model, others[-1], *QUICK, "--bits", 4).code == 0
        save_measured(others[-1], "offline")

        def changed(document: dict[str, Any], at: int = at, digest: str = digest) -> None:
            document["text"]["sha256"] = digest
            document["models"] = [{**document["models"][2], "name": f"other-{at}"}]

        edit_json(document_path(others[-1], "offline"), changed)
    write_report(measured, others)
    with opened(browser, measured / "report.html") as page:
        names = page.locator("section#pareto tbody td:first-child").all_inner_texts()
        caption = page.locator("section#pareto figcaption").inner_text()
    assert names == [*FORMATS, "other-0"]
    assert "Speeds of other-0 are from another run." in caption
    assert "other-1 was measured on another text and is left out." in caption


def test_nothing_is_wider_than_a_telephone(browser: Browser, measured: Path) -> None:
    write_report(measured)
    narrow = {"width": 360, "height": 740}
    with opened(browser, measured / "report.html", viewport=narrow) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# ---- the verb


def test_report_says_what_is_drawn_what_is_not_and_the_next_command(
    halfweave: Command, measured: Path
) -> None:
    document_path(measured, "serve").unlink()
    ran = halfweave("report", measured)
    assert ran.code == 0
    assert "drawn: Quality against size and speed" in ran.out
    assert "Latency against load: not measured" in ran.out
    assert f"  to measure it: halfweave bench {measured} serve --against" in ran.out
    assert ran.out.splitlines()[-1].startswith("next: open file:///")
    assert "chart 1/" in ran.err
    assert {file.stem for file in (measured / "report").glob("*.png")} == set(CHARTS) - {"latency"}
    for file in (measured / "report").glob("*.png"):
        assert colors(file.read_bytes()) > LEAST_COLORS
    assert "not measured" not in (measured / "README.md").read_text()
    document = halfweave("report", measured, "--json").document
    assert document["result"]["page"] == str(measured / "report.html")


def test_a_dry_run_writes_nothing(halfweave: Command, measured: Path) -> None:
    document_path(measured, "kernel").unlink()
    ran = halfweave("report", measured, "--dry-run")
    assert "offline: would be drawn" in ran.out
    assert f"kernel: not measured; halfweave bench {measured} kernel" in ran.out
    assert not (measured / "report.html").exists()


def test_without_matplotlib_the_extra_is_named(
    halfweave: Command, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_error(halfweave("report", measured), 3, "needs matplotlib", r"halfweave[report]")
    assert not (measured / "report.html").exists()


def test_a_directory_that_cannot_be_written_to_is_named(measured: Path) -> None:
    (measured / "report").write_text("in the way")
    with pytest.raises(HalfweaveError, match="report"):
        write_report(measured)


def test_overwriting_a_model_removes_its_report(
    halfweave: Command, measured: Path, tiny_model: Path
) -> None:
    write_report(measured)
    assert halfweave("prune", tiny_model, measured, *QUICK, "--overwrite").code == 0
    left = {entry.name for entry in measured.iterdir()}
    assert not left & {"measured", "report", "report.html"}
