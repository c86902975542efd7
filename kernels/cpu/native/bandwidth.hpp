// How fast memory can be read at all: what a matrix-vector product is measured against.
#pragma once
#include "pool.hpp"

namespace halfweave {

constexpr int64_t kReadBytes = 128;  // `bytes` below is a multiple of it

// Reads all of `data` on all threads of the pool: the sum of its 64-bit words.
uint64_t read_all(Pool& pool, const uint8_t* data, int64_t bytes);

}  // namespace halfweave
