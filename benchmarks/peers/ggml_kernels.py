"""ggml's Q4_0 products of one shape, by the libraries in llama-cpp-python: - THREADS.

Weights lie in the buffer type that llama.cpp repacks them into for this processor, if it has one.
"""

from __future__ import annotations

import ctypes
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp
from worker import serve

F32, Q4_0 = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_Q4_0
_GRAPH_BYTES = 1 << 22


class InitParameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_P = c_void_p
_SIGNATURES = {
    "ggml_init": (_P, [InitParameters]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, c_int, c_int64, c_int64]),
    "ggml_nbytes": (c_size_t, [_P]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), _P, c_int64, c_int64, c_int64, POINTER(c_float)],
    ),
    "ggml_set_input": (None, [_P]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_new_graph_custom": (_P, [_P, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_gallocr_new": (_P, [_P]),
    "ggml_gallocr_alloc_graph": (c_bool, [_P, _P]),
    "ggml_gallocr_free": (None, [_P]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, c_int]),
    "ggml_backend_graph_compute": (c_int, [_P, _P]),
    "ggml_backend_dev_by_type": (_P, [c_int]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [_P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, c_size_t, c_size_t]),
    "ggml_backend_load_all": (None, []),
}


class Ggml:
    """The functions above, from whichever of the libraries has them."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        found = [folder / f"libggml{part}.so" for part in ("-base", "-cpu", "")]
        libraries = [ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL) for file in found]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(each, name) for each in libraries if hasattr(each, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


class Kernels:
    """Answers with microseconds and bytes of one product."""

    version = llama_cpp.__version__

    def __init__(self, _: str, threads: int) -> None:
        self._ggml: Any = Ggml()
        self._ggml.ggml_backend_load_all()
        self._backend = self._ggml.ggml_backend_cpu_init()
        self._ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._buffers = self._repacking() or self._ggml.ggml_backend_cpu_buffer_type()
        self._made: tuple[int, ...] = ()
        self._graph, self._bytes, self._held = None, 0, ()

    def answer(self, ask: dict[str, Any], salt: int) -> dict[str, Any]:
        """As halfweave_kernels.py."""
        shape = ask["N"], ask["K"], ask["M"], ask["copies"]
        if shape != self._made:
            self._free()
            self._make(*shape)
            self._made = shape
        start = time.perf_counter()
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute gave {status}")
        return {"us": 1e6 * seconds / ask["copies"], "bytes": self._bytes}

    def _repacking(self) -> Any:
        ggml = self._ggml
        device = ggml.ggml_backend_dev_by_type(0)
        registry = ggml.ggml_backend_dev_backend_reg(device)
        name = b"ggml_backend_dev_get_extra_bufts"
        address = ggml.ggml_backend_reg_get_proc_address(registry, name)
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        at = 0
        while kinds[at] and b"REPACK" not in ggml.ggml_backend_buft_name(kinds[at]):
            at += 1
        return kinds[at]

    def _make(self, rows: int, columns: int, tokens: int, copies: int) -> None:
        ggml = self._ggml
        weights = ggml.ggml_init(InitParameters(_GRAPH_BYTES, None, True))
        tensors = [ggml.ggml_new_tensor_2d(weights, Q4_0, columns, rows) for _ in range(copies)]
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, self._buffers)
        self._bytes = ggml.ggml_nbytes(tensors[0])
        stored = ctypes.create_string_buffer(self._bytes)
        values = (c_float * (rows * columns))(*[(i * 37 % 17) / 17 - 0.5 for i in range(columns)])
        ggml.ggml_quantize_chunk(Q4_0, values, stored, 0, rows, columns, None)
        for tensor in tensors:
            ggml.ggml_backend_tensor_set(tensor, stored, 0, self._bytes)
        context = ggml.ggml_init(InitParameters(_GRAPH_BYTES, None, True))
        x = ggml.ggml_new_tensor_2d(context, F32, columns, tokens)
        ggml.ggml_set_input(x)
        self._graph = ggml.ggml_new_graph_custom(context, copies + 64, False)
        for tensor in tensors:
            product = ggml.ggml_mul_mat(context, tensor, x)
            ggml.ggml_build_forward_expand(self._graph, product)
        allocator = ggml.ggml_gallocr_new(ggml.ggml_backend_cpu_buffer_type())
        ggml.ggml_gallocr_alloc_graph(allocator, self._graph)
        zeros = ctypes.create_string_buffer(4 * columns * tokens)
        ggml.ggml_backend_tensor_set(x, zeros, 0, len(zeros))
        self._held = (allocator, buffer, weights, context)

    def _free(self) -> None:
        if self._held:
            allocator, buffer, weights, context = self._held
            self._ggml.ggml_gallocr_free(allocator)
            self._ggml.ggml_backend_buffer_free(buffer)
            self._ggml.ggml_free(weights)
            self._ggml.ggml_free(context)


serve(Kernels)
