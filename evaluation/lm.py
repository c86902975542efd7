"""The model that the evaluation harness (lm_eval, extra `[eval]`) asks, under the name "halfweave".

Every question goes through the engine that serves requests, never through transformers. Contexts
are cut as the harness's own "hf" does with a `max_length` of one less than the model's positions,
since the last token of a text is predicted and never read.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..errors import HalfweaveError, RequestError, UsageError
from ..runtime.engine import Engine
from ..runtime.engine_settings import EngineSettings
from ..runtime.model import Model, load_model
from ..runtime.params import MAX_STOP_CHARS, MAX_STOP_STRINGS, SamplingParams
from ..runtime.request import (
    Event,
    Failed,
    GenerationRequest,
    PromptScored,
    TextDelta,
    TokenLogprob,
)

DEFAULT_NEW_TOKENS = 256
# Fields of SamplingParams that a task may set under their own names.
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
_READ = SamplingParams(max_tokens=0, prompt_logprobs=1)

# Told after each answer: answers done, answers in all, and the kind of question.
TaskProgress = Callable[[int, int, str], None]
# The words of a question (the harness's cache wants them), and tokens of its two parts.
_Scored = tuple[Any, list[int], list[int]]


@register_model("halfweave")
class HalfweaveLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Answers the harness's three kinds of questions. Close it, or use it as a context manager."""

    def __init__(
        self,
        pretrained: str | Path | Model,
        dtype: str = "auto",
        device: str = "cpu",
        progress: TaskProgress | None = None,
        **harness: Any,
    ) -> None:
        """Load the directory `pretrained`, or take a loaded model.

        `harness` has what the harness passes to every model, such as its batch size, which says
        nothing here: the engine batches by itself.

        Raises as `load_model`, and UsageError for an argument that nobody knows.
        """
        super().__init__()
        unknown = sorted(harness.keys() - {"batch_size", "max_batch_size"})
        if unknown:
            raise UsageError(f"the model halfweave has no argument {unknown[0]!r}")
        loaded = isinstance(pretrained, Model)
        self.model: Model = (
            pretrained if loaded else load_model(pretrained, dtype, device=device)  # type: ignore
        )
        self._progress = progress
        self._engine = Engine(self.model, EngineSettings(max_waiting=2**20))

    def close(self) -> None:
        """Stop the engine's thread."""
        self._engine.close()

    def __enter__(self) -> HalfweaveLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_length(self) -> int:
        """Most tokens that are read to predict the one after them."""
        return self.model.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UsageError: the model has none.
        """
        found = self.model.tokenizer.eos_id
        if found is None:
            raise UsageError(f"{self.model.name}: the tokenizer names no end token")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        first = self.model.tokenizer.bos_id
        return self.eot_token_id if first is None else first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; by default with what the model puts around a text that does not have it."""
        if add_special_tokens is None:
            prefix = self.model.tokenizer.decode([self.prefix_token_id], special=True)
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self.model.tokenizer.encode(string, special=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells requests of one template from those of another by."""
        return str(self.model.checkpoint.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, for the harness's own document.

        Raises:
            UsageError: the model has none, or not one of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        found = self.model.tokenizer.chat_template
        if found is None:
            raise UsageError(f"{self.model.name} has no chat template", "ask without one")
        if chat_template not in (True, "default"):
            raise UsageError(f"{self.model.name} has no chat template {str(chat_template)[:40]!r}")
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; the last message stays open without a generation prompt.

        Messages of the system are left out where the template refuses them, as the harness's own
        "hf" does.

        Raises:
            UsageError: the model has no template.
            RequestError: the template refuses these messages.
        """
        self.chat_template(True)
        render, begin = self.model.tokenizer.chat_text, add_generation_prompt
        try:
            return render(chat_history, begin, not begin)
        except RequestError:
            told = [message for message in chat_history if message["role"] != "system"]
            if len(told) == len(chat_history):
                raise
            return render(told, begin, not begin)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Nats of each continuation, and whether greedy decoding would have written it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Nats of each text, all of its tokens, in windows that read as much as fits."""
        owners, windows = [], []
        for owner, request in enumerate(requests):
            for window in self._windows(self.tok_encode(request.args[0])):
                owners.append(owner)
                windows.append((None, *window))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, kind="rolling")
        for owner, (nats, _) in zip(owners, scores, strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to its stop strings."""
        asked = [self._writing(*request.args) for request in requests]
        answers = self._answers([(ids, params) for ids, params, _ in asked], "generate")
        texts = []
        for request, (_, _, stops), events in zip(requests, asked, answers, strict=True):
            raw = "".join(event.text for event in events if isinstance(event, TextDelta))
            texts.append(postprocess_generated_text(raw, stops, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _windows(self, ids: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return map(make_disjoint_window, windows)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], kind: str = "loglikelihood", **_: Any
    ) -> list[tuple[float, bool]]:
        prompts = [(self._fitted(context, end), _READ) for _words, context, end in requests]
        scores = []
        for (words, _context, end), events in zip(
            requests, self._answers(prompts, kind), strict=True
        ):
            (scored,) = (event for event in events if isinstance(event, PromptScored))
            last = scored.logprobs[-len(end) :]
            scores.append((sum(each.logprob for each in last), all(map(_is_likeliest, last))))
            if words is not None:
                self.cache_hook.add_partial("loglikelihood", words, scores[-1])
        return scores

    def _fitted(self, context: list[int], end: list[int]) -> list[int]:
        """Both parts, the beginning cut off where they are too long."""
        if not end:
            raise HalfweaveError("a task asks for the likelihood of no tokens at all")
        if len(end) > self.max_length:
            raise UsageError(
                f"a continuation of {len(end)} tokens does not fit {self.model.name}, "
                f"which reads {self.max_length}",
                "leave out the task, or take a model with a longer context",
            )
        return (context + end)[-(self.max_length + 1) :]

    def _writing(
        self, context: str, settings: Mapping[str, Any]
    ) -> tuple[list[int], SamplingParams, list[str]]:
        """Prompt, parameters, and all strings that end the answer."""
        given: dict[str, Any] = {**normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS)}
        end = self.model.tokenizer.decode([self.eot_token_id], special=True)
        stops = handle_stop_sequences(given.pop("until"), eos=end)
        new_tokens = int(given.pop("max_gen_toks"))
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        sampling: dict[str, Any] = {name: given.pop(name) for name in _SAMPLING if name in given}
        temperature = float(given.pop("temperature", 0.0))
        if given:
            raise UsageError(f"a task sets {sorted(given)[0]!r}, which halfweave does not know")
        room = self.max_length - new_tokens
        if room < 1:
            raise UsageError(
                f"a question and {new_tokens} new tokens do not fit {self.model.name}, "
                f"which has {self.model.max_model_len} positions",
                "leave out the task, or take a model with a longer context",
            )
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        # The engine takes so many; the others are cut off the finished text.
        early = [text for text in stops if 0 < len(text) <= MAX_STOP_CHARS][:MAX_STOP_STRINGS]
        params = SamplingParams(
            max_tokens=new_tokens, temperature=temperature, stop=tuple(early), seed=0, **sampling
        )
        return ids, params, stops

    def _answers(
        self, asked: Sequence[tuple[list[int], SamplingParams]], kind: str
    ) -> Iterator[list[Event]]:
        """All events of each request, in their order; they run side by side.

        None are kept here: a set of tasks may have millions of tokens.
        """
        requests = [
            GenerationRequest(uuid.uuid4().hex, tuple(ids), params) for ids, params in asked
        ]
        streams = [self._engine.stream(request) for request in requests]
        for done, stream in enumerate(streams, start=1):
            events = list(stream)
            if isinstance(events[-1], Failed):
                raise events[-1].error
            yield events
            if self._progress is not None:
                self._progress(done, len(streams), kind)


def _is_likeliest(token: TokenLogprob) -> bool:
    return token.logprob >= token.top[0][1]
