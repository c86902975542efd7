// One token: every weight is read once, in order, and nothing of it is kept.
#pragma once
#include <cstring>

#include "blocks.hpp"
#include "walk.hpp"

namespace halfweave {

// The sums of one block for one register of rows.
template <class L, class F>
HW_INLINE typename L::Ints block_sum(const uint8_t* p, const uint8_t* x) {
  typename F::Sum sum;
  typename L::CodeSum codes_sum;
  F::each_step(p, [&](int step, auto codes, auto selectors) {
    sum.add(F::input(x, step, selectors, 16), codes);
    if (!F::kSigned) codes_sum.add(codes);
  });
  return F::kSigned ? sum.total() : L::minus_128_times(sum.total(), codes_sum.total());
}

// A Multiply of one token.
template <class L, class F>
void matvec(const Weight& w, const Inputs& x, const float* bias, float* y, int64_t, int64_t first,
            int64_t last) {
  constexpr int kSlices = kTileRows / L::kLanes, kSliceBytes = kLine / kSlices;
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows, count = w.rows_of(tile);
    float rows[kTileRows] = {};
    if (bias) memcpy(rows, bias + row, count * sizeof(float));
    typename L::Floats total[kSlices];
    for (int s = 0; s < kSlices; s++) total[s] = L::load_floats(rows + s * L::kLanes);
    each_block(w, w.data + tile * w.tile_bytes(), 0, w.columns,
               [&](const uint8_t* p, const uint16_t* scales, int64_t column) {
                 fetch(p + kAhead, block_bytes(F::kKind));
                 const auto input_scale = L::all(x.scales[(uint64_t)column / kBlock] / F::kUnit);
                 for (int s = 0; s < kSlices; s++) {
                   const auto sum = block_sum<L, F>(p + s * kSliceBytes, x.bytes + column);
                   const auto scale = L::times(L::load_halves(scales + s * L::kLanes), input_scale);
                   total[s] = L::fma(L::to_floats(sum), scale, total[s]);
                 }
               });
    for (int s = 0; s < kSlices; s++) L::store_floats(rows + s * L::kLanes, total[s]);
    memcpy(y + row, rows, count * sizeof(float));
  }
}

}  // namespace halfweave
