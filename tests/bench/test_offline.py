"""A benchmark says speed, quality and baseline together, or nothing."""

import copy
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from halfweave.bench.batches import BatchSample, decode_length
from halfweave.bench.compare import NO_CHANGE, compare
from halfweave.bench.offline import BenchResult, bench_offline
from halfweave.bench.offline_plan import BenchPlan
from halfweave.bench.progress import silent
from halfweave.bench.stats import Spread, distribution, percentiles
from halfweave.bench.token_bytes import token_bytes
from halfweave.bench.turns import ReadBandwidth, Sample, take_turns
from halfweave.cli import bench_tables
from halfweave.errors import UsageError
from halfweave.files import sha256_file
from halfweave.runtime.eval import evaluate
from halfweave.runtime.model import LoadSettings, load_model
from support.tiny import edit_json

TEXT = "Two foxes keep every fourth weight; nobody minds the lazy zero. " * 30
PLAN = BenchPlan(24, 9, 5, window=64, max_windows=2, batches=(1, 3))


@pytest.fixture(scope="module")
def labels() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(tiny_model: Path, packed_model: Path, labels: list[str]) -> BenchResult:
    return bench_offline(
        {"packed": packed_model, "tiny": tiny_model},
        TEXT,
        plan=PLAN,
        progress=lambda done, total, what: labels.append(what),
    )


def test_the_dense_model_is_the_baseline_and_comes_first(result: BenchResult) -> None:
    assert [(m.name, m.is_baseline) for m in result.models] == [("tiny", True), ("packed", False)]


def test_every_speed_has_the_quality_of_the_same_run(
    result: BenchResult, tiny_model: Path, packed_model: Path
) -> None:
    dense, packed = load_model(tiny_model), load_model(packed_model)
    alone = evaluate(packed, TEXT, window=64, max_windows=2, against=dense)
    tiny, other = result.models
    assert (other.ppl, other.kl, other.agreement) == pytest.approx(
        (alone.ppl, alone.kl, alone.agreement)
    )
    assert (tiny.ppl, tiny.kl) == (pytest.approx(alone.against_ppl), None)


def test_models_are_measured_in_turns_after_a_warm_up(
    result: BenchResult, labels: list[str]
) -> None:
    turns = [label for label in labels if label.startswith(("warm", "measure"))]
    one = [f"{name}{size}" for size in ("", " x1", " x3") for name in ("tiny", "packed")]
    assert turns == [f"{what} {each}" for what in ("warm up", *["measure"] * 5) for each in one]
    assert [len(m.samples) for m in result.models] == [5, 5]


def test_the_first_token_is_in_ttft_and_in_no_gap(result: BenchResult) -> None:
    for sample in (sample for model in result.models for sample in model.samples):
        assert len(sample.gaps_ms) == sum(sample.gap_tokens) == PLAN.new_tokens - 1
        assert sample.ttft_ms >= sample.prefill_ms > 0


def test_figures_follow_from_the_raw_samples(result: BenchResult) -> None:
    for model in result.models:
        assert model.ttft_ms.median == statistics.median(s.ttft_ms for s in model.samples)
        fastest = max(8000 / sum(s.gaps_ms) for s in model.samples)
        assert model.decode_tokens_per_s.high == pytest.approx(fastest)
        slowest = min(24000 / s.prefill_ms for s in model.samples)
        assert model.prefill_tokens_per_s.low == pytest.approx(slowest)
        gaps = [gap for s in model.samples for gap in s.gaps_ms]
        assert model.itl_ms["p50"] == pytest.approx(statistics.median(gaps))
        assert len(gaps) == 40 and model.itl_ms["p99"] is None
        assert model.itl_ms["p50"] <= (model.itl_ms["p90"] or 0) <= max(gaps)


def test_decode_speed_counts_tokens_not_chunks() -> None:
    sample = Sample(ttft_ms=500.0, prefill_ms=400.0, gaps_ms=(10.0, 30.0), gap_tokens=(1, 3))
    assert sample.decode_tokens_per_s == pytest.approx(100.0)


def test_a_spread_is_median_least_and_greatest() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0, 2.5]) == Spread(2.5, 1.0, 9.0)


def test_percentiles_are_interpolated_between_the_raw_values() -> None:
    values = [float(each) for each in range(150, 0, -1)]
    assert percentiles(values) == pytest.approx({"p50": 75.5, "p90": 135.1, "p99": 148.51})


def test_a_percentile_of_too_few_values_is_none() -> None:
    values = [float(each) for each in range(99)]
    assert percentiles(values) == {"p50": 49.0, "p90": pytest.approx(88.2), "p99": None}
    assert percentiles(values[:9]) == {"p50": 4.0, "p90": None, "p99": None}
    assert distribution([7.0]) == {"p50": 7, "p90": None, "p99": None, "mean": 7}
    assert distribution([]) is None


def test_sizes_are_those_on_the_disk(
    result: BenchResult, tiny_model: Path, packed_model: Path
) -> None:
    for model, directory in zip(result.models, (tiny_model, packed_model), strict=True):
        assert model.weight_bytes == (directory / "model.safetensors").stat().st_size
        assert model.disk_bytes == sum(file.stat().st_size for file in directory.iterdir())


def test_the_result_has_hardware_versions_and_raw_samples(result: BenchResult) -> None:
    assert (result.hardware.cores >= 1, result.hardware.threads) == (True, 1)
    assert set(result.versions) >= {"halfweave", "torch"}
    document = json.loads(json.dumps(result.body(), allow_nan=False))
    assert document["text"]["tokens"] == 2 * 63
    assert len(document["models"][0]["samples"][0]["gaps_ms"]) == 8
    assert document["peak_memory_bytes"] > 2**20


def test_a_model_without_room_for_itself_alone_is_measured_all_the_same(
    tiny_model: Path, packed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run

    def killed(*arguments: Any, **options: Any) -> Any:
        """As by a system that has no memory left."""
        if str(packed_model) in options["input"]:
            return subprocess.CompletedProcess(arguments, -9, "", "")
        return real(*arguments, **options)

    monkeypatch.setattr("halfweave.bench.footprint.subprocess.run", killed)
    found = bench_offline({"tiny": tiny_model, "packed": packed_model}, TEXT, plan=PLAN)
    tiny, packed = found.models
    assert tiny.peak_rss_bytes is not None and packed.peak_rss_bytes is None
    assert packed.load_s is None and packed.decode_tokens_per_s.median > 0
    assert any(note.startswith("packed: its loading and memory") for note in found.notes)
    (load,) = (row for row in bench_tables.offline(found)[1] if row[0] == "load, s")
    assert load[2] == "-"


def test_the_kernels_are_named_and_weights_that_are_expanded_said_to_be_no_faster(
    result: BenchResult, tiny_model: Path, packed_model: Path
) -> None:
    _, packed = result.models
    assert next(iter(packed.kernels.values())).startswith("cpu-")
    assert not any("can be no faster than dense" in note for note in result.notes)
    paths: dict[str, str | Path] = {"tiny": tiny_model, "packed": packed_model}
    exact = bench_offline(paths, TEXT, plan=PLAN, loading=LoadSettings("float32"))
    assert next(iter(exact.models[1].kernels.values())).startswith("torch-dense")
    assert any("can be no faster than dense" in note for note in exact.notes)


def test_runs_are_compared_by_the_ratio_to_dense_of_the_same_turn(result: BenchResult) -> None:
    """Of a document as it is written, with the times of a steady machine in place of this one's.

    A neighbour that takes the core for one of five turns hides any change of the others.
    """
    machine = {**asdict(result.hardware), "line": result.hardware.line}
    told = {"kind": "offline", "hardware": machine, "plan": asdict(PLAN), "model": {}}
    first = json.loads(json.dumps({**told, **result.body()}))
    for ms, model in zip((20.0, 10.0), first["models"], strict=True):
        for turn, sample in enumerate(model["samples"]):
            sample["gaps_ms"] = [ms + 0.1 * (turn % 2)] * (PLAN.new_tokens - 1)
            sample["gap_tokens"] = [1] * (PLAN.new_tokens - 1)
    assert (compare(first, first).verdict, compare(first, first).relative) == (NO_CHANGE, True)
    busy = copy.deepcopy(first)
    for sample in (sample for model in busy["models"] for sample in model["samples"]):
        sample.update(prefill_ms=1.3 * sample["prefill_ms"], ttft_ms=1.3 * sample["ttft_ms"])
        sample["gaps_ms"] = [1.3 * gap for gap in sample["gaps_ms"]]
    assert compare(first, busy).verdict == NO_CHANGE
    slower = copy.deepcopy(first)
    for sample in slower["models"][1]["samples"]:
        sample["gaps_ms"] = [1.1 * gap for gap in sample["gaps_ms"]]
    found = {each.name: each for each in compare(first, slower).changes}
    (ratio, speed) = (found[f"packed: decode{end}"] for end in (", to dense", ""))
    assert (ratio.decides, ratio.verdict, ratio.repetitions) == (True, "slower", (5, 5))
    assert not speed.decides
    dense, packed = (
        [8000 / sum(s["gaps_ms"]) for s in model["samples"]] for model in first["models"]
    )
    wanted = statistics.median(own / other for own, other in zip(packed, dense, strict=True))
    assert ratio.first == pytest.approx(wanted)
    batched = {"decode x1", "prefill x1", "decode x3", "prefill x3"}
    assert {f"packed: {each}, to dense" for each in batched} < found.keys()
    assert not any(each.relative for each in found.values() if each.name.startswith("tiny"))


def test_a_warm_up_without_room_for_a_batch_costs_no_measurement(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    calls = iter(range(1000))

    def crowded_at_first(*given: Any) -> BatchSample | None:
        return None if next(calls) == 0 else BatchSample(0.1, 0.1, 8)

    monkeypatch.setattr("halfweave.bench.turns.one_batch", crowded_at_first)
    model, plan = load_model(tiny_model), replace(PLAN, batches=(3,))
    settings = LoadSettings("float32")
    _, batches = take_turns({"tiny": model}, (1, 2, 3), plan, silent, ReadBandwidth(settings))
    assert len(batches["tiny"][3]) == 5


def test_a_pruned_model_alone_is_refused(packed_model: Path) -> None:
    with pytest.raises(UsageError, match="no dense baseline") as caught:
        bench_offline({"packed": packed_model}, TEXT, plan=PLAN)
    assert "--against" in str(caught.value.hint)


def test_a_dense_model_is_its_own_baseline(tiny_model: Path) -> None:
    result = bench_offline({"tiny": tiny_model}, TEXT, plan=PLAN)
    assert [m.is_baseline for m in result.models] == [True]


@pytest.mark.parametrize(
    ("hashes", "noted"), [("parent", False), ("stranger", True)], ids=["parent", "stranger"]
)
def test_a_baseline_that_is_not_the_parent_is_noted(
    copy_of: Callable[[Path], Path], tiny_model: Path, packed_model: Path, hashes: str, noted: bool
) -> None:
    packed = copy_of(packed_model)
    weights = tiny_model / "model.safetensors"
    digest = sha256_file(weights) if hashes == "parent" else "0" * 64
    provenance = {"base": {"name": "tiny", "sha256": {"model.safetensors": digest}}}
    edit_json(packed / "halfweave.json", lambda d: d.update(provenance=provenance))
    result = bench_offline({"packed": packed, "tiny": tiny_model}, TEXT, plan=PLAN)
    assert any("not the model that packed was pruned from" in n for n in result.notes) == noted


def test_quality_on_the_calibration_text_is_noted(
    copy_of: Callable[[Path], Path], tiny_model: Path, packed_model: Path
) -> None:
    packed = copy_of(packed_model)
    digest = evaluate(load_model(tiny_model), TEXT, window=64).text_sha256
    provenance = {"calibration": {"text_sha256": digest}}
    edit_json(packed / "halfweave.json", lambda d: d.update(provenance=provenance))
    result = bench_offline({"packed": packed, "tiny": tiny_model}, TEXT, plan=PLAN)
    assert any("calibrated on this very text" in note for note in result.notes)


def test_batches_are_measured_while_all_are_being_written(result: BenchResult) -> None:
    """48 tokens of three prompts are read in one step, so that nobody waits for anybody."""
    for model in result.models:
        assert [each.batch for each in model.batches] == [1, 3]
        for each in model.batches:
            assert len(each.samples) == 5
            steps = {sample.decode_tokens / each.batch for sample in each.samples}
            assert steps <= {PLAN.new_tokens - 1.0, float(PLAN.new_tokens)}
            fastest = max(s.decode_tokens / s.decode_s for s in each.samples)
            assert each.decode_tokens_per_s.high == pytest.approx(fastest)
            slowest = max(s.prefill_s for s in each.samples)
            assert each.prefill_tokens_per_s.low == pytest.approx(24 * each.batch / slowest)


def test_later_requests_of_a_batch_find_the_first_ones_still_writing() -> None:
    assert decode_length(16, 128, 64, 256) == 64 + 9  # 2048 tokens, 240 a step
    assert decode_length(1, 1, 5, 256) == 6


def test_bytes_of_a_token_and_the_share_of_bandwidth(
    result: BenchResult, tiny_model: Path, packed_model: Path
) -> None:
    tiny, packed = result.models
    dense = load_model(tiny_model)
    # fp32 as it is stored, but for rows and columns that are filled up; without the norms.
    floats = 4 * sum(p for p in (2 * (2 * 72 * 72 + 2 * 24 * 72 + 3 * 136 * 72), 320 * 72))
    assert dense.exact is False
    assert tiny.bytes_per_token is not None and packed.bytes_per_token is not None
    assert floats <= tiny.bytes_per_token < 2 * floats
    assert packed.bytes_per_token < tiny.bytes_per_token / 2
    assert result.read_gb_per_s is not None and packed.mbu is not None
    read = packed.bytes_per_token * packed.decode_tokens_per_s.median
    assert packed.mbu == pytest.approx(read / (1e9 * result.read_gb_per_s))
    exact = load_model(tiny_model, "bfloat16")
    assert token_bytes(exact) == floats // 2


def test_load_time_and_memory_are_those_of_a_process_of_its_own(result: BenchResult) -> None:
    for model in result.models:
        assert model.load_s is not None and 0 < model.load_s < 60
        assert model.peak_rss_bytes is not None
        assert 50 * 2**20 < model.peak_rss_bytes < 4 * 2**30


@pytest.mark.parametrize(
    "wrong", [{"repetitions": 4}, {"new_tokens": 1}, {"prompt_tokens": 0}, {"warmups": 0}]
)
def test_a_plan_that_measures_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        BenchPlan(**wrong)
    with pytest.raises(UsageError, match="given twice"):
        BenchPlan(batches=(1, 4, 1))


def test_a_plan_must_fit_the_context_and_the_text(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        bench_offline({"tiny": tiny_model}, TEXT, plan=BenchPlan(250, 7, batches=()))
    with pytest.raises(UsageError, match="the prompt needs 24"):
        bench_offline({"tiny": tiny_model}, "Too short.", plan=PLAN)
