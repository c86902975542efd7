"""Other people's formats into Hugging Face directories, offline. Now: GGUF.

Knows files and who reads them; the tensors themselves are transformers' affair.
"""

from __future__ import annotations

import importlib.metadata
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModel, UsageError
from ..files import read_json, write_json, write_text
from .beside import built_beside, refuse_taken
from .gguf_file import GgufFile
from .gguf_gaps import check_gaps, fill_gaps

IMPORT_RECORD = "halfweave-import.json"
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_INSTALL = "pip install 'halfweave[gguf]'"
_SOURCE_NAME = "source.gguf"

# Told after each step: steps done, steps in all, and what was done.
ImportProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ImportResult:
    """What was imported, and what became of the numbers on the way."""

    path: Path
    source: GgufFile
    dtype: str
    parameters: int
    nbytes: int

    @property
    def notice(self) -> str:
        """One sentence on what these weights are, for people to read."""
        types = ", ".join(f"{n} {name}" for name, n in sorted(self.source.tensor_types.items()))
        if not self.source.quantized:
            return f"The weights were floats in {self.source.path.name} ({types} tensors)."
        return (
            f"The weights were DEQUANTIZED to {self.dtype} from {self.source.path.name} "
            f"({types} tensors): what quantization lost is not in this directory, and every "
            f"comparison with it as the dense model is with the dequantized one."
        )


@dataclass(frozen=True)
class ImportPlan:
    """What an import will write, and the memory that it takes: the whole model in `dtype`."""

    source: GgufFile
    dtype: str
    output_bytes: int
    peak_memory_bytes: int


def plan_import(file: Path, out: Path, dtype: str = "bfloat16") -> ImportPlan:
    """Read the file's tensor table, and refuse what `import_gguf` would before its work."""
    _check(out, dtype)
    source = GgufFile.open(file)
    check_gaps(source)
    count = source.parameters * _DTYPES[dtype].itemsize
    return ImportPlan(source, dtype, count, count)


def import_gguf(
    file: Path,
    out: Path,
    dtype: str = "bfloat16",
    progress: ImportProgress | None = None,
) -> ImportResult:
    """Write a GGUF model as a dense Hugging Face directory, without the network.

    `out` appears complete or not at all: it is built beside its place and renamed. Takes memory for
    the whole model in `dtype`.

    Raises:
        UsageError: the file or a needed package is missing, or the dtype is unknown.
        RefusedError: `out` exists and is not empty.
        UnsupportedModel: transformers knows no way to read this architecture from GGUF, or would
            lose a part of the model on it.
        CheckpointError: this is no GGUF file, or it is damaged or cut short.
    """
    tell = progress or (lambda done, total, what: None)
    _check(out, dtype)
    source = GgufFile.open(file)
    check_gaps(source)
    tell(1, 3, f"read {file.name}")
    with built_beside(out) as build:
        told = f"converted {sum(source.tensor_types.values())} tensors to {dtype}"
        parameters = _convert(source, build, dtype, lambda: tell(2, 3, told))
        nbytes = sum(f.stat().st_size for f in build.glob("*.safetensors"))
        result = ImportResult(out, source, dtype, parameters, nbytes)
        write_text(build / "README.md", _card(result))
        write_json(build / IMPORT_RECORD, _record(result))
    tell(3, 3, f"wrote {out.name}")
    return result


def _check(out: Path, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    refuse_taken(out)


def _convert(source: GgufFile, build: Path, dtype: str, loaded: Callable[[], None]) -> int:
    """Let transformers read the file and write the directory; returns the parameter count.

    `loaded` is called in between.
    """
    with tempfile.TemporaryDirectory() as alone, _quiet_transformers():
        # Read through a link of its own, so that no file beside the source is taken for a part.
        (Path(alone) / _SOURCE_NAME).symlink_to(source.path.resolve())
        tokenizer, model = _load(source, Path(alone), _DTYPES[dtype])
        _split_digits(tokenizer, source.pre_tokenizer)
        fill_gaps(source, tokenizer, model)
    loaded()
    with _quiet_transformers():
        model.save_pretrained(build, max_shard_size="4GB")
        tokenizer.save_pretrained(build)
    _drop_traces_of_loading(build / "tokenizer_config.json")
    return int(model.num_parameters())


def _load(source: GgufFile, directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The tokenizer and the dense model of a GGUF file that lies alone in `directory`."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise UsageError("importing GGUF needs a newer transformers", _INSTALL) from error
    where = {"gguf_file": _SOURCE_NAME, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **where)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **where,
        )
    except MemoryError:
        raise
    except Exception as error:  # a damaged tokenizer raises Exception itself
        raise _explained(error, source) from error
    _refuse_invented_weights(info, source)
    return tokenizer, model


def _refuse_invented_weights(info: dict[str, Any], source: GgufFile) -> None:
    """transformers fills what a file lacks with random numbers; a damaged file must not pass."""
    for reason in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(reason) or ())):
            raise CheckpointError(
                f"{source.path} does not hold a whole model: {reason.replace('_', ' ')} {names[:4]}"
            )


def _explained(error: Exception, source: GgufFile) -> Exception:
    cause = str(error).strip().split("\n")[0]
    if isinstance(error, ImportError) or "accelerate" in cause:
        return UsageError(f"importing GGUF needs another package: {cause}", _INSTALL)
    if "not supported" in cause or isinstance(error, NotImplementedError):
        return UnsupportedModel(f"{source.path}: {source.architecture}: {cause}")
    return CheckpointError(f"{source.path} does not hold a whole model: {cause}")


def _split_digits(tokenizer: Any, pre_tokenizer: str | None) -> None:
    """SmolLM splits every digit off before merging; transformers' GGUF reader does not know it."""
    if pre_tokenizer != "smollm":
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _drop_traces_of_loading(path: Path) -> None:
    """Remove what transformers notes of how this tokenizer was loaded; it is no property of it."""
    config = read_json(path)
    for key in ("is_local", "local_files_only", "gguf_file"):
        config.pop(key, None)
    write_json(path, config)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars out of our output, and leave its settings as found."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Not every bar of theirs heeds their switch for bars.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _record(result: ImportResult) -> dict[str, Any]:
    source = result.source
    return {
        "source": {
            "file": source.path.name,
            "sha256": source.sha256,
            "architecture": source.architecture,
            "tensor_types": source.tensor_types,
        },
        "dequantized": source.quantized,
        "dtype": result.dtype,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("halfweave", "transformers", "gguf", "torch")
        },
    }


def _card(result: ImportResult) -> str:
    source = result.source
    header = f"---\nlicense: {source.license}\n---\n\n" if source.license else ""
    return (
        f"{header}# {result.path.name}\n\n"
        f"{result.notice}\n\n"
        f"- source: `{source.path.name}`, SHA-256 `{source.sha256}`\n"
        f"- {result.parameters:,} parameters, {result.nbytes:,} bytes of safetensors\n"
        f"- imported by halfweave; `{IMPORT_RECORD}` holds the same for machines\n"
    )
