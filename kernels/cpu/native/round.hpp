// Float weights rounded to int8 or int4 while they are packed: no copy in between.
#pragma once
#include "layout.hpp"

namespace halfweave {

// Writes the tiles [first, last) of `shape`, an int8 or int4 weight in groups of a block, into `out`,
// all of whose bytes are set. `values` [rows, columns] are floats of the dense kind `from`.
//
// int8: a scale makes the largest of its 32 columns 127. int4: of some scales around the one that
// makes the largest 7, the one with the least squared error. A scale is no smaller than a normal
// half; where one of its columns is no finite number, it is none.
void round_weight(const Weight& shape, int32_t from, const uint8_t* values, uint8_t* out,
                  int64_t first, int64_t last);

}  // namespace halfweave
