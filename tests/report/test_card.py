"""The model card has the measured figures, and only of the weights that are there."""

from __future__ import annotations

import re
from pathlib import Path

from halfweave.report.card import update_card
from halfweave.report.documents import document_path
from support.command import Command
from support.measured import save_measured
from support.tiny import edit_json


def rows(card: Path) -> dict[str, str]:
    """The card's first table."""
    found = re.findall(r"^\| ([a-zA-Z ,-]+) \| (.+) \|$", card.read_text(), re.M)
    return dict(reversed(found))


def test_a_fresh_card_says_not_measured(pruned: Path) -> None:
    found = rows(pruned / "README.md")
    assert found["perplexity"] == found["speed"] == "not measured"


def test_measured_figures_take_their_places_however_often(pruned: Path) -> None:
    card = pruned / "README.md"
    before = card.read_text()
    save_measured(pruned, "eval")
    assert update_card(pruned)
    assert rows(card)["perplexity"] == "49.66 (dense: 20.64), n = 4088 tokens of a text"
    assert rows(card)["speed"] == "not measured"
    save_measured(pruned)
    update_card(pruned)
    update_card(pruned)
    text = card.read_text()
    assert "sparse24\\_int4: 543.0 (510.4-608.2)" in rows(card)["speed"]
    assert text.count("## Measured") == 1
    assert "| riddles, acc, n = 24 | 0.7500 (standard error 0.0900) | 0.5000" in text
    for kind in ("eval", "offline"):
        document_path(pruned, kind).unlink()
    update_card(pruned)
    assert card.read_text() == before


def test_eval_updates_the_card(halfweave: Command, pruned: Path, tiny_model: Path) -> None:
    flags = ("--window", 64, "--max-windows", 2)
    ran = halfweave("eval", pruned, "--against", tiny_model, *flags, "--json").document
    assert rows(pruned / "README.md")["perplexity"].startswith(f"{ran['result']['ppl']:.2f} (")
    assert (
        f"| same next token as dense | - | {100 * ran['result']['agreement']:.1f} % |"
        in (pruned / "README.md").read_text()
    )


def test_recovered_weights_were_not_measured(
    halfweave: Command, pruned: Path, tiny_model: Path, tmp_path: Path
) -> None:
    save_measured(pruned)
    update_card(pruned)
    license_ = Path(__file__).parents[2] / "LICENSE"
    flags = ("--parent", tiny_model, "--calib", license_, "--tokens", 5120)
    assert halfweave("recover", pruned, tmp_path / "recovered", *flags).code == 0
    text = (tmp_path / "recovered" / "README.md").read_text()
    assert rows(tmp_path / "recovered" / "README.md")["perplexity"] == "not measured"
    assert "## Measured" not in text
    assert "## Recovery" in text


def test_hostile_names_stay_in_their_cells(pruned: Path) -> None:
    save_measured(pruned)
    name = "x | <script>alert(1)</script>\n## Free | `rm` [a](b)"
    edit_json(document_path(pruned, "eval"), lambda d: d.update(text=name))
    edit_json(document_path(pruned, "offline"), lambda d: d["models"][0].update(name=name))
    update_card(pruned)
    text = (pruned / "README.md").read_text()
    assert "<script" not in text
    assert not re.search(r"^## Free", text, re.M)
    assert "x \\| &lt;script&gt;" in text


def test_a_card_that_is_not_ours_is_left_alone(pruned: Path) -> None:
    save_measured(pruned)
    (pruned / "README.md").write_text("# My model\n")
    assert not update_card(pruned)
    assert (pruned / "README.md").read_text() == "# My model\n"
    (pruned / "README.md").unlink()
    assert not update_card(pruned)
