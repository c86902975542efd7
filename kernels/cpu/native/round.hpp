// Float weights rounded to int8 while they are packed: no copy in between.
#pragma once
#include "layout.hpp"

namespace halfweave {

// Writes the tiles [first, last) of `shape`, an int8 weight in groups of a block, into `out`, all of
// whose bytes are set. `values` [rows, columns] are floats of the dense kind `from`. A scale makes
// the largest of its 32 columns 127 and is no smaller than a normal half; where one of them is no
// finite number, the scale is none.
void round_to_int8(const Weight& shape, int32_t from, const uint8_t* values, uint8_t* out,
                   int64_t first, int64_t last);

}  // namespace halfweave
