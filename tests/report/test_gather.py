"""What is read of a model directory, for models whose linears share names."""

from __future__ import annotations

import json
from pathlib import Path

from halfweave.report.gather import gather
from support.command import QUICK, Command
from support.tiny import FAMILIES, save_tiny


def test_both_projections_of_gpt2_keep_their_errors(halfweave: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dense = save_tiny(tmp_path / "dense", FAMILIES["gpt2"])
    assert halfweave("prune", dense, out, *QUICK).code == 0
    linears = json.loads((out / "halfweave.json").read_text())["linears"]
    errors = gather(out).errors
    for kind in ("attn.c_proj", "mlp.c_proj"):
        assert errors[1, kind] == linears[f"transformer.h.1.{kind}"]["relative_error"]
    rows = [line.split()[:2] for line in halfweave("inspect", out).out.splitlines()]
    assert {("attn.c_proj", "2"), ("mlp.c_proj", "2")} <= {tuple(row) for row in rows}


def test_of_experts_the_worst_error_is_told(halfweave: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dense = save_tiny(tmp_path / "dense", FAMILIES["mixtral"])
    assert halfweave("prune", dense, out, *QUICK).code == 0
    linears = json.loads((out / "halfweave.json").read_text())["linears"]
    own = [linears[name]["relative_error"] for name in linears if ".0." in name and ".w1" in name]
    found = gather(out).errors
    assert len(own) > 1
    assert found[0, "experts.*.w1"] == max(own)
    assert len(found) == 2 * (4 + 3)
