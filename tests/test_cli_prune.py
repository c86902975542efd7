"""The verbs prune and recover, driven as a user drives them, on real tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

from halfweave import Recipe
from halfweave.files import sha256_file
from support.command import ENTRY, QUICK, Command, assert_error
from support.tiny import Tiny, save_tiny


def test_prune_shows_a_plan_a_line_a_layer_a_table_and_the_next_command(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = halfweave("prune", tiny_model, out, *QUICK)
    plan, *rest = ran.err.splitlines()
    assert plan.startswith("plan: 14 linears in 2 blocks to sparse24")
    layer = re.compile(r"linear \d+/14 model\.layers\.\d\.\S+ err \d\.\d{3} \d+\.\d s eta \d+s")
    assert len([line for line in rest if layer.fullmatch(line)]) == 14
    assert re.search(r"^down_proj +2 +0\.\d{4} +0\.\d{4} +sparse24", ran.out, re.M)
    assert ran.out.splitlines()[-1] == f"next: halfweave eval {out} --against {tiny_model}"
    assert (out / "halfweave.json").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    ran = halfweave("prune", tiny_model, tmp_path / "out", *QUICK, "--dry-run")
    assert ran.code == 0
    assert "plan: 14 linears" in ran.out
    assert "of memory here" in ran.out
    assert not (tmp_path / "out").exists()


def test_prune_json_is_one_document_with_every_linear(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    ran = halfweave("prune", tiny_model, tmp_path / "out", *QUICK, "--bits", 4, "--json")
    document = ran.document
    assert document["recipe"]["bits"] == 4
    linears = document["result"]["linears"]
    assert len(linears) == 14
    assert {entry["format"] for entry in linears.values()} == {"sparse24_int4"}


def test_the_plan_of_a_budget_promises_no_format(halfweave: Command, tiny_model: Path) -> None:
    dense = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    short = ("--calib-length", 64, "--dry-run")
    plain = halfweave("prune", tiny_model, "never", *short, "--json").document["plan"]
    flags = ("--max-ppl-ratio", 1.2, *short)
    assert "formats of a budget's choice" in halfweave("prune", tiny_model, "never", *flags).out
    plan = halfweave("prune", tiny_model, "never", *flags, "--json").document["plan"]
    assert plain["output_bytes"] < plan["output_bytes"] == plan["input_bytes"] <= dense
    assert plan["seconds"] > plain["seconds"]


def test_a_recipe_file_gives_the_same_bytes_and_flags_change_it(
    halfweave: Command, tiny_model: Path, pruned: Path, tmp_path: Path
) -> None:
    recipe = ("--recipe", pruned / "halfweave.json")
    assert halfweave("prune", tiny_model, tmp_path / "again", *recipe).code == 0
    for shard in pruned.glob("*.safetensors"):
        assert sha256_file(shard) == sha256_file(tmp_path / "again" / shard.name)
    flags = ("--seed", 5, "--dry-run", "--json")
    ran = halfweave("prune", tiny_model, tmp_path / "x", *recipe, *flags)
    assert ran.document["recipe"]["seed"] == 5
    assert ran.document["recipe"]["method"] == "magnitude"


def test_row_13_ctrl_c_exits_130_and_resume_goes_on(halfweave: Command, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", Tiny(layers=12))
    flags = ["--calib-windows", "24", "--calib-length", "128"]
    command = [*ENTRY, "prune", str(model), str(tmp_path / "out"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("linear 10/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-2:] == [
        "next: the same command with --resume goes on from the last finished block",
        "interrupted",
    ]
    ran = halfweave("prune", model, tmp_path / "out", *flags, "--resume", "--json")
    assert ran.document["result"]["resumed_blocks"] >= 1


def test_a_budget_beside_a_pattern_exits_2(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    flags = ("--max-ppl-ratio", 1.2, "--pattern", "2:4")
    ran = halfweave("prune", tiny_model, tmp_path / "out", *flags)
    assert_error(ran, 2, "a budget chooses pattern and bits", "leave out --pattern")


def test_a_budget_over_the_recipe_of_another_starts_a_new_search(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    linear, file = "model.layers.0.mlp.up_proj", tmp_path / "old.json"
    old = Recipe(calib_length=16, target_bytes=0.9, choices={linear: "int4"})
    file.write_text(json.dumps(old.to_json()))
    dry = ("prune", tiny_model, "never", "--recipe", file, "--dry-run", "--json")
    again = halfweave(*dry).document
    assert again["recipe"] == old.to_json()
    assert "int4" in {entry["format"] for entry in again["plan"]["linears"]}
    new = halfweave(*dry, "--max-ppl-ratio", 1.05).document
    assert new["recipe"]["choices"] == {}
    assert (new["recipe"]["max_ppl_ratio"], new["recipe"]["target_bytes"]) == (1.05, 0.0)
    assert new["plan"]["scratch_bytes"] > again["plan"]["scratch_bytes"] == 0
    plain = halfweave(*dry, "--target-bytes", 0, "--bits", 4).document
    assert {entry["format"] for entry in plain["plan"]["linears"]} == {"sparse24_int4"}
    assert_error(halfweave(*dry, "--bits", 4), 2, "a budget chooses pattern and bits")
    assert_error(halfweave(*dry, "--pattern", "2:4"), 2, "a budget chooses pattern and bits")


def test_a_dry_run_refuses_what_the_run_would(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    dry = ("prune", tiny_model, tmp_path / "out", "--dry-run")
    out_of_reach = ("--target-bytes", 0.05, "--calib-length", 16)
    assert_error(halfweave(*dry, *out_of_reach), 2, "cannot be reached", "is the least")
    told = r"calib_length 512 is more than the 256 positions"
    assert_error(halfweave(*dry), 2, told, "--calib-length 256 at most")


def test_a_run_that_trains_tells_how_long_and_what_came_of_it(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    out, license_ = tmp_path / "out", Path(__file__).parents[1] / "LICENSE"
    trains = ("--recover", "blocks+distill", "--recover-tokens", 2048)
    ran = halfweave("prune", tiny_model, out, *QUICK, "--calib", license_, *trains)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()[-4:]
    assert re.fullmatch(rf"{re.escape(str(out))} is complete, \d+\.\d s", lines[0])
    assert re.fullmatch(r"recovery took \d+s of that", lines[1])
    assert lines[2].startswith("training: 2048 tokens in ")
    assert lines[3].startswith("next: halfweave eval ")


# ---- recover


def test_settings_of_a_training_that_nobody_asked_for_are_no_wish(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    """The model would not be trained, and whoever forgot --recover would believe that it was."""
    ran = halfweave("prune", tiny_model, tmp_path / "out", *QUICK, "--recover-minutes", 5)
    assert_error(ran, 2, "--recover-minutes has no effect", "add --recover distill")
    assert not (tmp_path / "out").exists()


def test_recover_shows_its_steps_what_it_did_and_the_next_command(
    halfweave: Command, tiny_model: Path, pruned: Path, tmp_path: Path
) -> None:
    out, license_ = tmp_path / "recovered", Path(__file__).parents[1] / "LICENSE"
    flags = ("--parent", tiny_model, "--calib", license_, "--tokens", 5120)
    ran = halfweave("recover", pruned, out, *flags, "--bits", 4, "--group", 32)
    assert ran.code == 0, ran.err
    assert re.search(r"^token 3072/3072 recovered, KL \d\.\d{3} \d+\.\d s eta 0s", ran.err, re.M)
    assert re.search(r"^linear 14/14 model\.layers\.1\.mlp\.down_proj err ", ran.err, re.M)
    assert re.search(r": 5120 tokens in \d+\.\d min, KL from the dense model on held-out", ran.out)
    rounding = r"^  rounding blocks to codes took it from \d\.\d{3} to \d\.\d{3}$"
    assert len(re.findall(rounding, ran.out, re.M)) == 2
    assert ran.out.splitlines()[-1] == f"next: halfweave eval {out} --against {tiny_model}"
    again = halfweave("recover", pruned, out, *flags, "--bits", 4, "--group", 32)
    assert_error(again, 3, f"{out} holds a finished model", "--overwrite")
    assert_error(
        halfweave("recover", pruned, out), 2, "Missing option '--parent'", "recover --help"
    )
    ran = halfweave("recover", pruned, tmp_path / "plain", *flags, "--json")
    assert ran.document["result"]["tokens"] == 5120
