// One row of a packed weight as floats: what a token's id stands for.
#pragma once
#include "layout.hpp"

namespace halfweave {

// Whether rows of that kind can be read: int8 and dense floats.
constexpr bool can_embed(int32_t kind) {
  return kind == kInt8 || (holds_floats(kind) && !is_sparse(kind));
}

// Writes row `row` of `w` into out [columns].
void unpack_row(const Weight& w, int64_t row, float* out);

}  // namespace halfweave
