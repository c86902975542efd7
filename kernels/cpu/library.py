"""The shared library of CPU kernels: found, loaded, and its C functions given their types.

HALFWEAVE_CPU_LEVEL forces an instruction set: portable, avx2 or avx512_vnni. Without the library,
which takes a C++ compiler to install, `library` is None and says so once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import HalfweaveError, UsageError
from .cores import granted_cores

LEVEL_VARIABLE = "HALFWEAVE_CPU_LEVEL"
LEVELS = ("avx512_vnni", "avx2", "portable")
ABI = 1  # HW_ABI of native/api.h
LINEARS = 7  # of a decoder block
FILE = Path(__file__).with_name("libhalfweave_cpu.so")
_FAILURES = {
    1: "a pointer is null",
    2: "a shape is impossible",
    3: "a buffer has another size than its shape",
    4: "a token, position or page is out of range",
    5: "there is no memory left",
}
_log = logging.getLogger(__name__)


class WeightStruct(Structure):
    """hw_weight: a packed weight."""

    _fields_ = (
        ("kind", c_int32),
        ("group", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("data", c_void_p),
        ("bytes", c_int64),
    )


class NormStruct(Structure):
    """hw_norm: gain and bias of a norm."""

    _fields_ = (("gain", c_void_p), ("bias", c_void_p))


class BlockStruct(Structure):
    """hw_block: the weights of one decoder block."""

    _fields_ = (
        ("attention_norm", NormStruct),
        ("mlp_norm", NormStruct),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("linears", WeightStruct * LINEARS),
        ("biases", c_void_p * LINEARS),
    )


class ShapeStruct(Structure):
    """hw_shape: a decoder's sizes."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("ffn", "vocab", "rotary_dim", "window", "cache_bits")),
        ("parallel", c_int64),
        ("norm_eps", c_float),
        ("activation", c_int32),
    )


class EndsStruct(Structure):
    """hw_ends: the weights that are not in the blocks."""

    _fields_ = (
        ("embedding", WeightStruct),
        ("head", WeightStruct),
        ("embedding_norm", NormStruct),
        ("norm", NormStruct),
        ("positions", WeightStruct),
        ("first_position", c_int64),
        ("frequencies", c_void_p),
        ("slopes", c_void_p),
    )


class CacheStruct(Structure):
    """hw_cache: pages of keys and values."""

    _fields_ = (("data", c_void_p), ("bytes", c_int64), ("pages", c_int64))


class BatchStruct(Structure):
    """hw_batch: tokens of some sequences."""

    _fields_ = (
        ("tokens", c_int64),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("pages", c_void_p),
        ("page_count", c_int64),
        ("pages_start", c_void_p),
    )


_W = POINTER(WeightStruct)
_P = c_void_p
# Result and argument types, in the order of api.h.
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hw_level": (_P, [c_char_p]),
    "hw_level_name": (c_char_p, [_P]),
    "hw_pool_new": (_P, [c_int32]),
    "hw_pool_free": (None, [_P]),
    "hw_read": (c_int32, [_P, _P, c_int64, POINTER(c_uint64)]),
    "hw_packed_bytes": (c_int64, [c_int32, c_int32, c_int64, c_int64]),
    "hw_pack": (c_int32, [_P, WeightStruct, _P, _P, _P, _P]),
    "hw_round": (c_int32, [_P, WeightStruct, c_int32, _P, _P]),
    "hw_linear": (c_int32, [_P, _P, _W, _P, c_int64, _P, _P]),
    "hw_decoder_new": (
        c_int32,
        [POINTER(ShapeStruct), POINTER(BlockStruct), POINTER(EndsStruct), POINTER(_P)],
    ),
    "hw_decoder_free": (None, [_P]),
    "hw_page_bytes": (c_int64, [_P]),
    "hw_forward": (c_int32, [_P, _P, _P, POINTER(BatchStruct), POINTER(CacheStruct), _P]),
    "hw_logits": (c_int32, [_P, _P, _P, _P, c_int64, _P]),
}


class _Threads:
    """The kernels' threads in one process, and what keeps their callers apart."""

    def __init__(self, functions: ctypes.CDLL, count: int) -> None:
        self.pool = functions.hw_pool_new(count)
        if not self.pool:
            raise HalfweaveError(f"{count} threads for the CPU kernels could not be started")
        self.one_at_a_time = threading.Lock()
        # Not when the interpreter ends: a thread that ends with it may be in a call.
        weakref.finalize(self, _free_threads, functions, self.pool, os.getpid()).atexit = False


def _free_threads(functions: ctypes.CDLL, pool: int, process: int) -> None:
    """A fork has copied no threads, and would wait for them here without end."""
    if process == os.getpid():
        functions.hw_pool_free(pool)


class Library:
    """The loaded library, at the level of one instruction set, with threads of its own.

    The threads serve one call at a time; calls from several threads wait for each other. A forked
    process starts threads of its own with its first call.
    """

    def __init__(self, functions: ctypes.CDLL, level: int, threads: int) -> None:
        """`level` is what hw_level gave."""
        self.functions = functions
        self.level_pointer = level
        self.level = functions.hw_level_name(level).decode()
        self.threads = threads
        self._started: dict[int, _Threads] = {}  # by process
        self._threads_here()

    @property
    def pool(self) -> int:
        """The threads, as the library's functions take them."""
        return int(self._threads_here().pool)

    def call(self, function: str, *arguments: object) -> None:
        """Call one of the functions that answer with a code.

        Raises:
            HalfweaveError: the library refused the call, for the reason that is given.
        """
        with self._threads_here().one_at_a_time:
            code = getattr(self.functions, function)(*arguments)
        if code:
            raise HalfweaveError(f"CPU kernel refused: {_FAILURES.get(code, code)}")

    def _threads_here(self) -> _Threads:
        process = os.getpid()
        found = self._started.get(process)
        if found is None:  # two callers at once may both start some; those of one are freed
            found = self._started.setdefault(process, _Threads(self.functions, self.threads))
        return found


@cache
def library() -> Library | None:
    """The library for this process, at the best level of this machine; None if not installed.

    Raises:
        UsageError: the environment asks for a level that is unknown, or that is not there.
    """
    wanted = os.environ.get(LEVEL_VARIABLE) or None
    if wanted is not None and wanted not in LEVELS:
        raise UsageError(f"{LEVEL_VARIABLE}={wanted!r} is none of {', '.join(LEVELS)}")
    functions = load(FILE)
    if functions is None and wanted is not None:
        raise UsageError(f"{LEVEL_VARIABLE}={wanted}: the CPU kernels are not installed")
    return None if functions is None else open_level(functions, wanted)


def address(tensor: Tensor, what: str, dtype: torch.dtype, *size: int) -> int:
    """Where the numbers of a tensor are. The library sees nothing else of it.

    Raises:
        HalfweaveError: it has another type or shape, or its numbers do not lie in order in memory.
    """
    if tensor.dtype is dtype and tensor.shape == size and tensor.is_cpu and tensor.is_contiguous():
        return tensor.data_ptr()
    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    raise HalfweaveError(f"{what} is {found}{layout}, where {dtype} {list(size)} on cpu is needed")


def open_level(
    functions: ctypes.CDLL, name: str | None = None, threads: int | None = None
) -> Library:
    """A library of its own at one level, the best for None.

    It has `threads`, or as many as torch, but no more than there are cores for.

    Raises:
        UsageError: this machine cannot run the level.
    """
    level = functions.hw_level(None if name is None else name.encode())
    if not level:
        raise UsageError(f"this machine cannot run the CPU kernels' level {name}")
    return Library(functions, level, threads or min(torch.get_num_threads(), granted_cores()))


@cache
def load(file: Path) -> ctypes.CDLL | None:
    """The typed functions of a built library; None, and a warning, if it cannot be loaded."""
    try:
        functions = ctypes.CDLL(str(file))
    except OSError as error:
        _log.warning(
            "the CPU kernels are not installed (%s): packed weights are expanded instead, which "
            "is slower; install a C++ compiler and then halfweave again",
            error,
        )
        return None
    built = functions.hw_abi() if hasattr(functions, "hw_abi") else 0
    if built != ABI:
        _log.warning(
            "the CPU kernels are of another build than this Python code (interface %d, not %d): "
            "packed weights are expanded instead, which is slower; install halfweave again",
            built,
            ABI,
        )
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions
