// The way through one tile, block by block. Every kernel goes it.
#pragma once
#include "layout.hpp"

namespace halfweave {

// Has memory send what is read soon. The hardware does so by itself, but not far enough ahead: decoding
// was a tenth faster with this on an Intel Xeon, and reading cold weights a quarter. Beyond the
// weight's end nothing comes of it.
HW_INLINE void fetch(const uint8_t* p, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += kLine) __builtin_prefetch(p + line);
}
constexpr int64_t kAhead = 4096;  // bytes between what is used and what is fetched

// Calls use(data, scales, column) for the blocks that begin in [from, to): where a block and its 16
// scales are. `from` begins a pair of groups, or is 0. Returns the end.
template <class Use>
HW_INLINE const uint8_t* each_block(const Weight& w, const uint8_t* p, int64_t from, int64_t to,
                                    Use&& use) {
  const int64_t step = block_bytes(w.kind);
  const uint8_t* scales = p;
  for (int64_t start = from; start < to; start += w.group) {
    const int64_t odd = start / w.group % 2, end = start + w.group < to ? start + w.group : to;
    if (!odd) {
      scales = p;
      p += kLine;
    }
    for (int64_t column = start; column < end; column += kBlock, p += step)
      use(p, (const uint16_t*)(scales + odd * (kLine / 2)), column);
  }
  return p;
}

// The same for formats without scales, through a whole tile: calls use(data, column).
template <class Use>
HW_INLINE void each_float_block(const Weight& w, const uint8_t* p, Use&& use) {
  const int64_t step = block_bytes(w.kind);
  for (int64_t column = 0; column < w.columns; column += kBlock, p += step) use(p, column);
}

}  // namespace halfweave
