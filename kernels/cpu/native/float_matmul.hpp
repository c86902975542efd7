// Weights of floats: products and sums in fp32, nothing is rounded on the way.
#pragma once
#include "float_blocks.hpp"
#include "walk.hpp"

namespace halfweave {

// One tile for W tokens, whose inputs are `x` and whose results are `y`. Even and odd steps have
// sums of their own, since one alone would wait for itself.
template <class L, class F, int W>
void multiply_floats(const Weight& w, const uint8_t* tile, const Inputs& inputs, const float* x,
                     const float* bias, float* y, int64_t stride, int64_t rows) {
  constexpr int kSlices = kTileRows / L::kLanes;
  typename L::Floats sums[kSlices][W][2];
  for (auto& slice : sums)
    for (auto& token : slice) token[0] = token[1] = L::zero();
  each_float_block(w, tile, [&](const uint8_t* p, int64_t column) {
    for (int s = 0; s < kSlices; s++)
      F::each_step(p, s, [&](int step, auto values, auto indices) {
#pragma GCC unroll 16
        for (int t = 0; t < W; t++) {
          auto& sum = sums[s][t][step % 2];
          const auto input = F::input(x + t * inputs.columns + column, step, indices);
          sum = L::fma(values, input, sum);
        }
      });
  });
  for (int t = 0; t < W; t++) {
    float out[kTileRows];
    for (int s = 0; s < kSlices; s++)
      L::store_floats(out + s * L::kLanes, L::plus_floats(sums[s][t][0], sums[s][t][1]));
    for (int64_t i = 0; i < rows; i++) y[t * stride + i] = out[i] + (bias ? bias[i] : 0.f);
  }
}

template <class L, class F, int W>
void multiply_floats_up_to(int64_t tokens, const Weight& w, const uint8_t* tile,
                           const Inputs& inputs, const float* x, const float* bias, float* y,
                           int64_t stride, int64_t rows) {
  if (tokens == W) return multiply_floats<L, F, W>(w, tile, inputs, x, bias, y, stride, rows);
  if constexpr (W > 1)
    multiply_floats_up_to<L, F, W - 1>(tokens, w, tile, inputs, x, bias, y, stride, rows);
}

// A Multiply of any tokens; a token gets the same bits whatever stands beside it.
template <class L, class F>
void float_matmul(const Weight& w, const Inputs& x, const float* bias, float* y, int64_t stride,
                  int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = w.rows - row < kTileRows ? w.rows - row : kTileRows;
    for (int64_t token = 0; token < x.tokens; token += L::kFloatWidth) {
      const int64_t left = x.tokens - token;
      multiply_floats_up_to<L, F, L::kFloatWidth>(
          left < L::kFloatWidth ? left : L::kFloatWidth, w, w.data + tile * w.tile_bytes(), x,
          x.floats + token * x.columns, bias ? bias + row : nullptr, y + token * stride + row,
          stride, rows);
    }
  }
}

}  // namespace halfweave
