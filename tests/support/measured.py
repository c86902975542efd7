"""Documents of measurements as `halfweave bench` and `eval` write them, with made-up figures.

They are for tests of what reads them; nothing was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfweave.bench.document import about_model
from halfweave.report.documents import document_path

FORMATS = ("dense", "sparse24", "sparse24_int4", "int4")
BYTES_A_WEIGHT = {"dense": 2.0, "sparse24": 1.125, "sparse24_int4": 0.39, "int4": 0.52}
SHAPES = ((576, 576, 60), (192, 576, 60), (1536, 576, 60), (576, 1536, 30), (49152, 576, 1))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def head(directory: Path, kind: str) -> dict[str, Any]:
    """What all documents begin with."""
    return {
        "schema_version": 2,
        "kind": kind,
        "created": "2026-11-27T12:00:00+00:00",
        "command": ["halfweave", kind, str(directory)],
        "hardware": {
            "cpu": "A processor",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 24 * 2**30,
            "load": 0.1,
            "gpu": None,
            "line": "A processor, 2 cores",
        },
        "versions": {"halfweave": "0.1.0", "torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "model": about_model(directory),
        "plan": {"window": 512, "repetitions": 5},
        "notes": ["a note that has to be read"],
        "a_field_of_tomorrow": {"is": "ignored"},
    }


def around(value: float, share: float = 0.06) -> dict[str, float]:
    """A median with its spread."""
    return {"median": value, "low": value * (1 - share), "high": value * (1 + 2 * share)}


def kernel_document(directory: Path) -> dict[str, Any]:
    """Two formats, every shape and number of tokens, beside dense products and int4."""
    rows = [
        kernel_row(kind, n, k, count, tokens)
        for (n, k, count) in SHAPES
        for kind in FORMATS[1:3]
        for tokens in TOKENS
    ]
    return {**head(directory, "kernel"), "read_gb_per_s": 21.5, "rows": rows}


def kernel_row(kind: str, n: int, k: int, count: int, tokens: int) -> dict[str, Any]:
    """A product that is bound by memory, then by arithmetic."""
    read = BYTES_A_WEIGHT[kind] * n * k
    us = max(read / 19e3, 2 * n * k * tokens / 160e3)
    return {
        "format": kind,
        "N": n,
        "K": k,
        "M": tokens,
        "count": count,
        "kernel": f"cpu-{kind}",
        "us": around(us),
        "gb_per_s": read / us / 1e3,
        "bandwidth_share": read / us / 1e3 / 21.5,
        "gflop_per_s": 2 * n * k * tokens / us / 1e3,
        "to_dense": 2.0 / BYTES_A_WEIGHT[kind],
        "to_int4": None,
        "wins": kind != "dense",
        "others": {
            "torch-float32": {"us": around(2.2 * us), "samples_us": [us]},
            "native-dense": {"us": around(1.7 * us), "samples_us": [us]},
            "int4": {"us": around(1.2 * us), "samples_us": [us]},
        },
        "samples_us": [us * (1 + 0.01 * at) for at in range(7)],
    }


def offline_document(directory: Path, names: tuple[str, ...] = FORMATS) -> dict[str, Any]:
    """Four models, the dense one first; the names are those of their directories."""
    figures = {
        "dense": (256.6, 20.6, None, 95.0),
        "sparse24": (168.0, 46.0, 0.55, 172.0),
        "sparse24_int4": (160.0, 47.0, 0.54, 543.0),  # close to the one above
        "int4": (107.9, 22.5, 0.87, 320.0),
    }
    models = [
        model_speed(name, kind, *figures[kind]) for name, kind in zip(names, FORMATS, strict=True)
    ]
    text = {"origin": "a text", "sha256": "ab" * 32, "tokens": 4088}
    return {**head(directory, "offline"), "text": text, "models": models}


def model_speed(
    name: str, kind: str, mib: float, ppl: float, agreement: float | None, decode: float
) -> dict[str, Any]:
    """One model of an offline run."""
    return {
        "name": name,
        "path": name,
        "is_baseline": kind == "dense",
        "kernels": {kind: f"cpu-{kind}: chosen"},
        "disk_bytes": int(mib * 2**20) + 10_000,
        "weight_bytes": int(mib * 2**20),
        "ppl": ppl,
        "kl": None if agreement is None else 1 - agreement,
        "agreement": agreement,
        "prefill_tokens_per_s": around(4 * decode),
        "decode_tokens_per_s": around(decode),
        "ttft_ms": around(60.0),
        "itl_ms": {"p50": 5.0, "p90": 6.0, "p99": 9.0},
        "samples": [{}] * 5,
        "batches": [
            {
                "batch": batch,
                "prefill_tokens_per_s": around(4 * decode * batch**0.1),
                "decode_tokens_per_s": around(decode * batch**0.6),
                "samples": [{}] * 5,
            }
            for batch in (1, 2, 4, 8, 16)
        ],
        "load_s": 1.5,
        "peak_rss_bytes": 2**29,
        "bytes_per_token": 1e8,
        "mbu": 0.7,
    }


def serve_document(directory: Path) -> dict[str, Any]:
    """An open load that grows until the server cannot follow, and a closed one."""
    opened = [load_point("open", rate) for rate in (0.5, 1.0, 2.0, 4.0)]
    closed = [load_point("closed", clients) for clients in (1, 4, 16)]
    return {**head(directory, "serve"), "points": [*opened, *closed]}


def load_point(mode: str, load: float) -> dict[str, Any]:
    """One load, slower the higher it is."""

    def around_ms(base: float) -> dict[str, float]:
        slow = base * (1 + load / 4) ** 2
        # Close together where clients wait for their turn: their names may not cover each other.
        tail = (1.4, 2.1) if mode == "open" else (1.02, 1.05)
        return {"p50": slow, "p90": tail[0] * slow, "p99": tail[1] * slow, "mean": 1.1 * slow}

    return {
        "model": "sparse24_int4",
        "mode": mode,
        ("rate" if mode == "open" else "concurrency"): load,
        "requests": 60,
        "completed": 59,
        "failed": 1,
        "duration_s": 30.0,
        "ttft_ms": around_ms(50.0),
        "itl_ms": around_ms(5.0),
        "tpot_ms": around_ms(6.0),
        "e2e_ms": around_ms(400.0),
        "output_tokens_per_s": 150 * load / (1 + load / 5),
        "requests_per_s": load,
        "goodput_per_s": 0.9 * load,
        "samples": [],
    }


def eval_document(directory: Path) -> dict[str, Any]:
    """Quality of a model and of its dense parent, with a task."""
    return {
        **head(directory, "eval"),
        "text": "a text",
        "result": {
            "text_sha256": "ab" * 32,
            "tokens": 4088,
            "windows": 8,
            "window": 512,
            "ppl": 49.66,
            "kl": 0.81,
            "agreement": 0.53,
            "against_ppl": 20.64,
            "seconds": 12.0,
        },
        "against": {"path": "dense", "name": "dense", "digest": None, "weight_bytes": 269060552},
        "tasks": {"riddles": {"acc": {"value": 0.5, "stderr": 0.1}, "n": 24}},
        "against_tasks": {"riddles": {"acc": {"value": 0.75, "stderr": 0.09}, "n": 24}},
    }


DOCUMENTS = {
    "kernel": kernel_document,
    "offline": offline_document,
    "serve": serve_document,
    "eval": eval_document,
}


def save_measured(directory: Path, *kinds: str) -> None:
    """Write documents of these kinds, or of all, into a model directory."""
    for kind in kinds or DOCUMENTS:
        path = document_path(directory, kind)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(DOCUMENTS[kind](directory)))
