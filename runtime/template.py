"""Renders chat templates in a small process of its own, bounded in processor time and memory.

A template comes from the checkpoint and is hostile until proved otherwise. transformers' sandboxed
Jinja keeps it from reaching Python; but it can still loop for ever or fill the memory, and neither
a thread nor one endless operation inside it can be stopped. A process can. It is kept for the next
conversation, and replaced after it had to be ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError

TEMPLATE_SECONDS = 5.0  # of processor time, so that a busy machine is no reason to fail
TEMPLATE_BYTES = 2**29
_CHILD = Path(__file__).with_name("template_child.py")


class TemplateRenderer:
    """One chat template, ready to be rendered from any thread."""

    def __init__(
        self, template: str, variables: Mapping[str, Any], seconds: float = TEMPLATE_SECONDS
    ) -> None:
        """`variables` are what the template sees beside the messages: the special tokens."""
        self._setup = {
            "template": template,
            "variables": dict(variables),
            "seconds": seconds,
            "bytes": TEMPLATE_BYTES,
        }
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            RequestError: the template refuses the messages, or passes its limits.
        """
        request = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages are no JSON: {error}", "messages") from error
        with self._lock:
            reply = self._ask(line)
        if "text" not in reply:
            error_text = reply.get("error", "")
            raise RequestError(
                f"the chat template refused these messages: {error_text}", "messages"
            )
        return reply["text"]

    def _ask(self, line: str) -> dict[str, str]:
        if self._child is None or self._child.poll() is not None:
            self._child = self._started()
        child = self._child
        try:
            _write(child, line)
            answer = child.stdout.readline() if child.stdout else ""
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            self._child = None
            raise _died(child)
        reply: dict[str, str] = json.loads(answer)
        return reply

    def _started(self) -> subprocess.Popen[str]:
        # -P: the script's own directory must not shadow modules that it imports. A session of its
        # own: Ctrl-C is for this process to handle; the child ends when its input does.
        child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        weakref.finalize(self, _stop, child)
        _write(child, json.dumps(self._setup, default=str))
        return child


def _write(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def _died(child: subprocess.Popen[str]) -> RequestError:
    _stop(child)
    if child.returncode == -signal.SIGPROF:
        return RequestError("the chat template took too long on these messages", "messages")
    return RequestError("the chat template could not be rendered", "messages")


def _stop(child: subprocess.Popen[str]) -> None:
    child.kill()  # no effect, on the exit code either, if it has ended by itself
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
