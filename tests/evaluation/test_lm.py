"""The harness asks our engine, and hears what transformers would say of the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import UsageError
from halfweave.runtime.model import load_model
from support.harness import (
    LIKELIHOODS,
    MISSING,
    REASON,
    ROWS,
    TASKS,
    Evaluated,
    Harness,
    harness_of,
    oracle,
    write_tasks,
)
from support.tiny import Tiny, edit_json, pack_directory, save_tiny

pytestmark = pytest.mark.skipif(bool(MISSING), reason=REASON)
POSITIONS = 64  # so few that long texts have to be cut


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("short") / "short", Tiny(positions=POSITIONS))


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, short_model: Path) -> Harness:
    import halfweave.evaluation.lm  # noqa: F401  # registers the name "halfweave"

    return harness_of(write_tasks(tmp_path_factory.mktemp("riddles"), short_model))


@pytest.fixture(scope="module")
def wanted(harness: Harness, short_model: Path) -> Evaluated:
    return harness("hf", oracle(short_model, POSITIONS - 1), tuple(TASKS))


@pytest.fixture
def lm(short_model: Path) -> Iterator[Any]:
    from halfweave.evaluation.lm import HalfweaveLM

    with HalfweaveLM(load_model(short_model, "float32")) as made:
        yield made


def test_the_exact_path_is_evaluated_as_transformers_is(
    harness: Harness, wanted: Evaluated, short_model: Path
) -> None:
    found = harness("halfweave", f"pretrained={short_model},dtype=float32", tuple(TASKS))
    assert found.likelihoods == pytest.approx(wanted.likelihoods, abs=1e-3)
    assert found.greedy == wanted.greedy
    assert set(wanted.greedy) == {True, False}
    assert found.results["writing"] == wanted.results["writing"]
    for name, figures in wanted.figures.items():
        numbers = {key: number for key, number in figures.items() if isinstance(number, float)}
        assert {key: found.figures[name][key] for key in numbers} == pytest.approx(
            numbers, rel=1e-3
        )


def test_some_text_has_to_be_cut(lm: Any) -> None:
    """Else the test above would compare less than it says."""
    assert max(len(lm.tok_encode(row["text"])) for row in ROWS) > 2 * POSITIONS


def test_a_packed_model_is_evaluated_by_its_packed_weights(
    harness: Harness, short_model: Path, tmp_path: Path
) -> None:
    packed = pack_directory(short_model, tmp_path / "packed", "sparse24_int4")
    twin = oracle(tmp_path / "packed-dense", POSITIONS - 1)
    wanted = harness("hf", twin, LIKELIHOODS).likelihoods
    exact = harness("halfweave", f"pretrained={packed},dtype=float32", LIKELIHOODS).likelihoods
    assert exact == pytest.approx(wanted, abs=1e-3)
    fast = harness("halfweave", f"pretrained={packed}", LIKELIHOODS).likelihoods
    assert fast == pytest.approx(wanted, rel=0.02)
    assert fast != exact


def test_chats_are_asked_as_transformers_asks_them(harness: Harness, short_model: Path) -> None:
    """The same template, a system message and an example in front of each question."""
    asked = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "num_fewshot": 1,
        "system_instruction": "You see foxes.",
    }
    tasks = ("choice", "cloze", "writing", "rolling")
    wanted = harness("hf", oracle(short_model, POSITIONS - 1), tasks, **asked)
    found = harness("halfweave", f"pretrained={short_model},dtype=float32", tasks, **asked)
    plain = harness("halfweave", f"pretrained={short_model},dtype=float32", tasks)
    assert found.likelihoods == pytest.approx(wanted.likelihoods, abs=1e-3)
    assert found.greedy == wanted.greedy
    # The oracle finds its stop, an e, in the names of control tokens too, which are no text.
    answers = zip(found.results["writing"], wanted.results["writing"], strict=True)
    assert all(own and own.startswith(theirs) for own, theirs in answers)
    assert found.likelihoods != pytest.approx(plain.likelihoods, abs=1e-3)


def test_a_chat_has_the_text_of_the_template(lm: Any, short_model: Path) -> None:
    from transformers import AutoTokenizer

    oracle_of = AutoTokenizer.from_pretrained(short_model).apply_chat_template
    chat = [{"role": "user", "content": "Two"}, {"role": "assistant", "content": "weights"}]
    assert lm.apply_chat_template(chat) == oracle_of(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == oracle_of(
        chat, tokenize=False, continue_final_message=True
    )
    assert lm.chat_template(True) == lm.chat_template("default") == lm.model.tokenizer.chat_template
    assert lm.chat_template(False) is None
    assert short_model.name in lm.tokenizer_name and "/" not in lm.tokenizer_name
    with pytest.raises(UsageError, match="no chat template 'tools'"):
        lm.chat_template("tools")


def test_a_template_that_refuses_systems_is_asked_without_and_a_model_without_one_not_at_all(
    short_model: Path, tmp_path: Path
) -> None:
    from halfweave.evaluation.lm import HalfweaveLM

    strict = shutil.copytree(short_model, tmp_path / "strict")
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    (strict / "chat_template.jinja").write_text(refusing)
    edit_json(strict / "tokenizer_config.json", lambda d: d.pop("chat_template", None))
    user = {"role": "user", "content": "Two"}
    with HalfweaveLM(strict) as lm:
        assert lm.apply_chat_template([{"role": "system", "content": "x"}, user]) == "[Two]"
    (strict / "chat_template.jinja").unlink()
    with HalfweaveLM(strict) as lm, pytest.raises(UsageError, match="strict has no chat template"):
        lm.apply_chat_template([user])


def asked(*arguments: Any) -> Any:
    """A question as the harness puts it."""
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def test_all_stop_strings_count_however_many_there_are(lm: Any) -> None:
    settings = {"max_gen_toks": 24, "do_sample": False}
    (whole,) = lm.generate_until([asked("Two weights", {**settings, "until": []})])
    assert len(whole) > 8
    unused = [f"nothing like {number}" for number in range(6)]
    (cut,) = lm.generate_until([asked("Two weights", {**settings, "until": [*unused, whole[5]]})])
    assert cut == whole[: whole.index(whole[5])]


def test_sampling_of_a_task_is_carried_out_or_refused(lm: Any) -> None:
    sampled = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 5, "until": []}
    greedy = {"max_gen_toks": 8, "until": []}
    texts = [lm.generate_until([asked("Two", dict(each))])[0] for each in (sampled, greedy)]
    assert texts[0] != texts[1]
    with pytest.raises(UsageError, match="'num_beams', which halfweave does not know"):
        lm.generate_until([asked("Two", {**greedy, "num_beams": 4})])
    with pytest.raises(UsageError, match="64 new tokens do not fit short"):
        lm.generate_until([asked("Two", {**greedy, "max_gen_toks": 64})])


def test_an_empty_context_is_continued_from_the_prefix_token(lm: Any) -> None:
    settings = {"max_gen_toks": 4, "until": []}
    assert lm.generate_until([asked("", dict(settings))]) == lm.generate_until(
        [asked("<|endoftext|>", dict(settings))]
    )


def test_what_the_harness_cannot_ask_is_refused(lm: Any, short_model: Path) -> None:
    from halfweave.evaluation.lm import HalfweaveLM

    with pytest.raises(UsageError, match="no argument 'revision'"):
        HalfweaveLM(short_model, revision="main")
    with pytest.raises(UsageError, match="continuation of 64 tokens does not fit"):
        lm._loglikelihood_tokens([(None, [1], [2] * 64)])


def test_progress_counts_every_question(short_model: Path) -> None:
    from halfweave.evaluation.lm import HalfweaveLM

    seen: list[tuple[int, int, str]] = []
    with HalfweaveLM(short_model, progress=lambda *step: seen.append(step)) as lm:
        lm.generate_until([asked("Two", {"max_gen_toks": 2, "until": []})] * 3)
    assert seen == [(1, 3, "generate"), (2, 3, "generate"), (3, 3, "generate")]
