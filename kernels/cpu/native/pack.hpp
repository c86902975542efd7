// From a checkpoint's tensors (docs/format.md) to the layout of layout.hpp.
#pragma once
#include "layout.hpp"

namespace halfweave {

// A weight as it is stored. Codes of 4 bits are two a byte, low nibble first, code + 8; `meta` has
// one nibble per four columns and is null for dense formats; scales are fp16 [rows, groups] and null
// for floats.
struct Stored {
  const uint8_t* values;
  const uint8_t* meta;
  const uint16_t* scales;
};

// Writes the tiles [first, last) into `out`, all of whose bytes are set. `shape.data` is unused.
void pack(const Weight& shape, const Stored& stored, uint8_t* out, int64_t first, int64_t last);

}  // namespace halfweave
