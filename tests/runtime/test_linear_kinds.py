"""Kinds of linears: what tables and charts put in one row."""

from __future__ import annotations

import pytest
from halfweave.runtime.linear_kinds import kinds_of

LLAMA = {
    f"model.layers.{block}.{name}": name.split(".")[1]
    for block in range(11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
}
GPT2 = {
    f"transformer.h.{block}.{name}": kind
    for block in range(2)
    for name, kind in {
        "attn.c_attn": "c_attn",
        "attn.c_proj": "attn.c_proj",
        "mlp.c_fc": "c_fc",
        "mlp.c_proj": "mlp.c_proj",
    }.items()
}
EXPERTS = {
    **{f"model.layers.3.mlp.experts.{n}.up_proj": "experts.*.up_proj" for n in range(12)},
    "model.layers.0.mlp.up_proj": "mlp.up_proj",
    "model.layers.0.mlp.down_proj": "down_proj",
}


@pytest.mark.parametrize("wanted", [LLAMA, GPT2, EXPERTS, {"lm_head": "lm_head"}, {}])
def test_a_kind_is_as_much_of_the_name_as_tells_it_from_others(wanted: dict[str, str]) -> None:
    assert kinds_of(wanted) == wanted
