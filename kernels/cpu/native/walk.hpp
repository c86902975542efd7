// The way through one tile: groups of columns, units of at most 64 of them that have one scale of
// the weight and one of the input, blocks of 32. Every kernel goes it.
#pragma once
#include "layout.hpp"

namespace halfweave {

// Calls use(data, scales, column, blocks) for the units that begin in [from, to): where their
// blocks and their 16 scales are. `from` begins a pair of groups, or is 0. Returns the end.
template <class Use>
inline __attribute__((always_inline)) const uint8_t* each_unit(const Weight& w, const uint8_t* p,
                                                               int64_t from, int64_t to,
                                                               Use&& use) {
  const int64_t columns = w.blocks() * kBlock, step = block_bytes(w.kind);
  const uint8_t* scales = p;
  for (int64_t start = from; start < to; start += w.group) {
    if (start / w.group % 2 == 0) {
      scales = p;
      p += kLine;
    }
    const int64_t end = start + w.group < columns ? start + w.group : columns;
    for (int64_t column = start; column < end; column += kActivationGroup) {
      const int64_t left = end - column;
      const int64_t blocks = (left < kActivationGroup ? left : kActivationGroup) / kBlock;
      use(p, (const uint16_t*)(scales + start / w.group % 2 * (kLine / 2)), column, blocks);
      p += blocks * step;
    }
  }
  return p;
}

}  // namespace halfweave
