"""docs/results/scale.md from its twin: what was measured, what projected, what only planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_page(results: Path) -> None:
    """Write scale.md beside scale.json."""
    document = json.loads((results / "scale.json").read_text())
    (results / "scale.md").write_text(to_page(document))


def to_page(document: dict[str, Any]) -> str:
    """The page, in Markdown."""
    opt, bloom = document["opt_175b_block"], document["bloom_176b_plan"]
    seconds = ", ".join(f"{each:g}" for each in opt["seconds_each_block"])
    written = ", ".join(f"{each / 2**30:.2f}" for each in opt["bytes_per_block"])
    peak, planned = f"{opt['peak_rss_gib']:.2f} GiB", f"{opt['planned_rss_gib']:.2f}"
    return f"""# Models larger than the machine

{document["date"]}, {document["hardware"]}; {_versions(document["versions"])}.
Made by `{document["command"]}`.{_note(document["note"])}

## Measured: blocks of OPT-175B's shape

{opt["blocks"]} blocks with hidden size 12288 and FFN 49152, random fp16 weights, pruned to 2:4 by
`{opt["method"]}` with {opt["calibration_tokens"]} calibration tokens. The Hessian of `fc2`,
49152 x 49152 fp32 or 9 GiB, is summed by panels and factorized where it lies. Random weights say
nothing of quality; time and memory do not depend on them.

| | |
|---|---|
| seconds of each block | {seconds} |
| before the first: hashes, embedding, its shard | {opt["seconds_before_first_block"]:g} s |
| peak memory of the process | {peak} (the plan said {planned}) |
| the plan's time for all of it | {opt["planned_seconds"]:g} s |
| written for each block | {written} GiB |

| linear | relative error |
|---|---|
{_errors(opt["relative_errors"])}

The errors are those on 1024 of the calibration tokens. With fewer tokens than inputs they flatter.

## Projected: all 96 blocks

{opt["projected_hours_96_blocks"]:g} hours: 96 times the mean of the seconds above, on this machine
and with as many tokens. Passes and Hessians grow with the tokens, factorizations and sweeps do not.
Nobody has run this.

## Planned only: BLOOM-176B

From headers, by `--dry-run` on the same machine: {bloom["blocks"]} blocks with hidden size 14336
and FFN 57344, {bloom["calibration_tokens"]} calibration tokens, `{bloom["method"]}`.

| | |
|---|---|
| memory | {bloom["planned_rss_gib"]:g} GiB |
| disk for activations while it runs | {bloom["scratch_gib"]:g} GiB |
| time | {bloom["planned_hours"]:g} hours |
| weights | {bloom["input_gib"]:g} GiB become {bloom["output_gib"]:g} |

The run itself is refused where so much memory is not there.

## What a block needs

The block as stored and as pruned, the activations that enter it (in a mapped file from 2 GiB on),
the Hessians of its inputs, and some rows of the matrix at work. ADMM needs eight times the widest
Hessian, since it decomposes it in fp64; for 49152 inputs that is 72 GiB, so that on such a machine
`--method sparsegpt` is what can be had, and the refusal says so.
"""


def _note(note: str) -> str:
    return f" {note}" if note else ""


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def _errors(errors: dict[str, float]) -> str:
    return "\n".join(f"| `{name}` | {error:.4f} |" for name, error in errors.items())
