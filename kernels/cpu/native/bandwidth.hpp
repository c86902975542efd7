// How fast memory can be read at all: what a matrix-vector product is measured against.
#pragma once
#include "pool.hpp"

namespace halfweave {

// Reads every line of `data` on all threads of the pool; some sum of it, so that none is left out.
uint64_t read_all(Pool& pool, const uint8_t* data, int64_t bytes);

}  // namespace halfweave
