"""Linears and whole decoders in C++, multiplied in the packed form; see docs/cpu.md."""
