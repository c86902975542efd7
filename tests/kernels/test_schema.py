"""The quantization_config block is read strictly."""

from __future__ import annotations

from typing import Any

import pytest
from halfweave.errors import CheckpointError, HalfweaveError, RefusedError
from halfweave.kernels.schema import (
    LinearFormat,
    QuantizationConfig,
    parse_quantization_config,
)


def block(**changes: Any) -> dict[str, Any]:
    entry = {"format": "sparse24_int4", "shape": [8, 64], "group": 64, **changes}
    return {"quant_method": "halfweave", "version": 1, "linears": {"a.b": entry}}


def test_what_is_written_is_read_back() -> None:
    linears = {
        "x": LinearFormat("sparse24", (8, 16)),
        "y": LinearFormat("sparse24_int4", (8, 64), 32),
        "z": LinearFormat("int8", (8, 64)),
    }
    config = QuantizationConfig(linears)
    assert parse_quantization_config(config.to_json()) == config


def test_row_26_a_newer_version_says_which() -> None:
    with pytest.raises(RefusedError, match="version 2 is newer than 1"):
        parse_quantization_config({**block(), "version": 2})


@pytest.mark.parametrize("method", ["gptq", None, 3, "../halfweave", "os.system"])
def test_row_26_a_foreign_method_is_refused(method: object) -> None:
    with pytest.raises(RefusedError, match="another tool"):
        parse_quantization_config({**block(), "quant_method": method})


@pytest.mark.parametrize("name", ["os.path", "../sparse24", "marlin", "", 4, None, ["sparse24"]])
def test_row_26_an_unknown_format_is_refused_by_name(name: object) -> None:
    with pytest.raises(RefusedError, match="unknown format"):
        parse_quantization_config(block(format=name))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [8]},
        {"shape": [8, 0]},
        {"shape": [8, -4]},
        {"shape": [8, 2**40]},
        {"shape": [8, 4.0]},
        {"shape": [True, 4]},
        {"shape": "8x4"},
        {"group": 48},
        {"group": 0},
        {"group": None},
        {"group": True},
        {"format": "int8"},
        {"extra": 1},
    ],
)
def test_row_20_an_impossible_entry_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"a\.b"):
        parse_quantization_config(block(**changes))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {**block(), "surprise": 1},
        {**block(), "version": "1"},
        {**block(), "version": True},
        {**block(), "linears": []},
        {**block(), "linears": {"a": 3}},
    ],
)
def test_row_26_a_malformed_block_is_refused(bad: object) -> None:
    with pytest.raises(HalfweaveError, match="quantization_config"):
        parse_quantization_config(bad)


def test_messages_stay_short_whatever_the_input() -> None:
    with pytest.raises(RefusedError) as caught:
        parse_quantization_config(block(format="x" * 100_000))
    assert len(caught.value.message) < 300
