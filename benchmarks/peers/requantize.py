"""Writes a GGUF file in another type by llama.cpp itself: SOURCE TARGET Q4_0|Q8_0."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

source, target, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
settings.allow_requantize = True
settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))
