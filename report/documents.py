"""The documents that `halfweave eval` and `halfweave bench` leave in a model's `measured/`.

One file a kind, each replaced by the next measurement. A reader ignores fields that it does not
know and refuses other versions. What a document says is a stranger's word: text and numbers are
bounded here, and escaped where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ..bench.document import SCHEMA_VERSION
from ..errors import CheckpointError, RefusedError
from ..files import read_json, write_json
from ..kernels.schema import MEASURED_DIRECTORY

KINDS = ("eval", "kernel", "offline", "serve")
# The command that measures each kind, to be filled in with the model and its parent.
COMMANDS = {
    "eval": "halfweave eval {model} --against {dense}",
    "kernel": "halfweave bench {model} kernel",
    "offline": "halfweave bench {model} offline --against {dense}",
    "serve": "halfweave bench {model} serve --against {dense}",
}

Text = Annotated[str, Field(max_length=4096)]
_MOST = 1e18  # of any figure: what is measured has fewer, and sums and axes have to hold it
Positive = Annotated[FiniteFloat, Field(ge=0, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=int(_MOST))]
# JSON has no infinity, and so null stands for a figure that is none.
Figure = Annotated[FiniteFloat, Field(ge=-_MOST, le=_MOST)] | None


class _Part(BaseModel):
    """Fields that nobody here knows are for newer readers."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Spread(_Part):
    """Median over the repetitions, with the least and the greatest."""

    median: Positive
    low: Positive
    high: Positive


class Percentiles(_Part):
    """Of raw samples; None where there were too few."""

    p50: Positive | None = None
    p90: Positive | None = None
    p99: Positive | None = None
    mean: Positive | None = None


class Identity(_Part):
    """Which model. `digest` is that of bench's `about_model`, None where nothing vouches.

    An endpoint that ran already has a name and nothing else.
    """

    path: Text | None = None
    name: Text
    digest: Text | None = None
    weight_bytes: Count | None = None


class Machine(_Part):
    """What a measurement ran on; the fields of runtime's Hardware."""

    cpu: Text = "unknown processor"
    cores: Count = 0
    threads: Count = 0
    memory_bytes: Count = 0
    load: Positive = 0.0
    gpu: Text | None = None

    @property
    def line(self) -> str:
        """The whole in one line."""
        gpu = f", {self.gpu}" if self.gpu else ""
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{self.cpu}, {self.cores} cores, {self.threads} threads, {memory}{gpu}"


class BaseDocument(_Part):
    """What all kinds share."""

    schema_version: Literal[2]
    created: Text
    command: list[Text]
    hardware: Machine
    versions: dict[str, Text] = {}
    commit: Text | None = None
    model: Identity
    plan: dict[str, Any] = {}
    notes: list[Text] = []


class Quality(_Part):
    """The fields of runtime's EvalResult."""

    text_sha256: Text
    tokens: Count
    windows: Count
    window: Count
    ppl: Positive | None
    kl: Figure = None
    agreement: Positive | None = None
    against_ppl: Positive | None = None
    seconds: Positive = 0.0


class Metric(_Part):
    """One figure of a task, with its standard error where there is one."""

    value: Figure
    stderr: Figure = None


TaskFigures = dict[str, dict[str, Metric | int | None]]  # by task, then by metric; n is a number


class EvalDocument(BaseDocument):
    """Perplexity, distance from the dense parent, and tasks, of the model and of that parent."""

    kind: Literal["eval"]
    text: Text = "a text"
    result: Quality
    against: Identity | None = None
    tasks: TaskFigures = {}
    against_tasks: TaskFigures = {}


class Other(_Part):
    """The same product by another kernel or format."""

    us: Spread


class KernelRow(_Part):
    """One product: `count` linears [N, K] by M tokens; `others` did the same in the same run."""

    format: Text
    N: Count
    K: Count
    M: Count
    count: Count = 1
    kernel: Text = ""
    us: Spread
    gb_per_s: Positive
    bandwidth_share: Positive | None = None
    gflop_per_s: Positive
    to_dense: Positive | None = None
    to_int4: Positive | None = None
    wins: bool | None = None
    others: dict[str, Other] = {}
    samples_us: list[Positive] = []

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.N, self.K

    @property
    def tokens(self) -> int:
        """M."""
        return self.M

    @property
    def bytes(self) -> float:
        """Bytes that one product reads, by its own figures."""
        return self.gb_per_s * self.us.median * 1e3


class KernelDocument(BaseDocument):
    """Products by shape, format and number of tokens."""

    kind: Literal["kernel"]
    read_gb_per_s: Positive | None = None
    rows: list[KernelRow]


class BatchSpeed(_Part):
    """Speed of so many sequences side by side."""

    batch: Count
    prefill_tokens_per_s: Spread | Positive | None = None
    decode_tokens_per_s: Spread | Positive | None = None
    samples: list[Any] = []


class ModelSpeed(_Part):
    """One model of an offline run."""

    name: Text
    path: Text
    digest: Text | None = None
    is_baseline: bool = False
    kernels: dict[str, Text] = {}
    disk_bytes: Count = 0
    weight_bytes: Count
    ppl: Positive | None
    kl: Figure = None
    agreement: Positive | None = None
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    ttft_ms: Spread | None = None
    itl_ms: Percentiles | None = None
    samples: list[Any] = []
    batches: list[BatchSpeed] = []
    load_s: Positive | None = None
    peak_rss_bytes: Count | None = None
    bytes_per_token: Positive | None = None
    mbu: Positive | None = None


class MeasuredText(_Part):
    """What quality was measured on."""

    origin: Text = "a text"
    sha256: Text = ""
    tokens: Count = 0


class OfflineDocument(BaseDocument):
    """Speed and quality of several models in one run, in turns."""

    kind: Literal["offline"]
    text: MeasuredText = MeasuredText()
    models: list[ModelSpeed]


class LoadPoint(_Part):
    """One load on a server: a rate of requests a second, or so many clients at once."""

    mode: Literal["open", "closed"]
    model: Text = ""
    rate: Positive | None = None
    concurrency: Count | None = None
    requests: Count
    completed: Count
    failed: Count = 0
    refused: Count = 0
    timed_out: Count = 0
    duration_s: Positive = 0.0
    ttft_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    e2e_ms: Percentiles | None = None
    output_tokens_per_s: Positive | None = None
    requests_per_s: Positive | None = None
    goodput_per_s: Positive | None = None


class ServeDocument(BaseDocument):
    """A server under load."""

    kind: Literal["serve"]
    points: list[LoadPoint]


Document = EvalDocument | KernelDocument | OfflineDocument | ServeDocument
_TYPES: dict[str, type[Document]] = {
    "eval": EvalDocument,
    "kernel": KernelDocument,
    "offline": OfflineDocument,
    "serve": ServeDocument,
}


def document_path(directory: Path, kind: str) -> Path:
    """Where a model directory has its document of a kind."""
    return directory / MEASURED_DIRECTORY / f"{kind}.json"


def read_document(path: Path) -> Document:
    """Read and check one document.

    Raises:
        RefusedError: it is of another schema version.
        CheckpointError: it is missing, no JSON, of no known kind, or not as specified.
    """
    return _checked(path, read_json(path))


def write_document(path: Path, content: Mapping[str, Any]) -> Document:
    """Check a document, write it atomically, and return it as a reader will see it.

    `content` is ready for JSON. Folders are made.

    Raises:
        CheckpointError: it is not as specified.
        OSError: it cannot be written.
    """
    document = _checked(path, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return document


def _checked(path: Path, found: Mapping[str, Any]) -> Document:
    version, kind = found.get("schema_version"), found.get("kind")
    if version != SCHEMA_VERSION:
        raise RefusedError(
            f"{path}: schema version {str(version)[:20]} is not {SCHEMA_VERSION}",
            "measure again with this halfweave",
        )
    if not isinstance(kind, str) or kind not in _TYPES:
        raise CheckpointError(f"{path}: kind {str(kind)[:20]!r} is none of {', '.join(KINDS)}")
    try:
        return _TYPES[kind].model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:120]
        raise CheckpointError(
            f"{path}: {where}: {first['msg'][:120]}", "remove the file and measure again"
        ) from error
