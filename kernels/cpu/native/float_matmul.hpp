// Weights of floats: products and sums in fp32, nothing is rounded on the way.
#pragma once
#include <cstring>

#include "float_blocks.hpp"
#include "walk.hpp"

namespace halfweave {

// Columns of a tile that all tokens meet before the next ones: they stay in the first-level cache.
constexpr int64_t kFloatPieceColumns = 256;

// Adds one block's part to the sums of F::kTogether slices, from slice `s` on.
template <class L, class F, int W>
HW_INLINE void multiply_block(const uint8_t* p, int s, const float* x, int64_t columns,
                              typename L::Floats (*sums)[W][L::kFloatTurns]) {
  typename F::Indices indices[F::kTogether];
  typename L::Floats own[F::kTogether][W][L::kFloatTurns];  // in registers, which `sums` are not
  memcpy(own, sums, sizeof own);
  for (int i = 0; i < F::kTogether; i++) indices[i] = F::indices(p, s + i);
#pragma GCC unroll 16
  for (int first = 0; first < F::kSteps; first += L::kFloatTurns)
#pragma GCC unroll 2
    for (int turn = 0; turn < L::kFloatTurns; turn++) {  // known when compiled, as registers must be
      const int step = first + turn;
      typename L::Floats values[F::kTogether];
      for (int i = 0; i < F::kTogether; i++) values[i] = F::values(p, step, s + i);
#pragma GCC unroll 16
      for (int t = 0; t < W; t++) {
        const auto input = F::inputs(x + t * columns, step);
        for (int i = 0; i < F::kTogether; i++)
          own[i][t][turn] =
              L::fma(values[i], F::pick(input, indices[i], step), own[i][t][turn]);
      }
    }
  memcpy(sums, own, sizeof own);
}

// A piece of a tile for several tokens: `data` begins with column `from`, and `y` with the tile's rows.
struct FloatPiece {
  const uint8_t* data;
  int64_t from, to, rows, stride;
  const float* bias;  // null, but for a tile's last piece
};

// Adds the piece's part to the results of W tokens, whose inputs are `x`. Steps take turns with as
// many sums as it takes for none to wait for itself.
template <class L, class F, int W>
void multiply_floats(const Weight& w, const FloatPiece& piece, const float* x, int64_t columns,
                     float* y) {
  constexpr int kSlices = kTileRows / L::kLanes;
  typename L::Floats sums[kSlices][W][L::kFloatTurns];
  for (auto& slice : sums)
    for (auto& token : slice)
      for (auto& sum : token) sum = L::zero();
  const uint8_t* p = piece.data;
  for (int64_t column = piece.from; column < piece.to; column += kBlock, p += block_bytes(w.kind)) {
    fetch(p + kAhead, block_bytes(w.kind));
    for (int s = 0; s < kSlices; s += F::kTogether)
      multiply_block<L, F, W>(p, s, x + column, columns, sums + s);
  }
  for (int t = 0; t < W; t++) {
    float out[kTileRows];
    for (int s = 0; s < kSlices; s++) {
      auto sum = sums[s][t][0];
      for (int turn = 1; turn < L::kFloatTurns; turn++) sum = L::plus_floats(sum, sums[s][t][turn]);
      L::store_floats(out + s * L::kLanes, sum);
    }
    float* rows = y + t * piece.stride;
    for (int64_t i = 0; i < piece.rows; i++)
      rows[i] = (piece.from ? rows[i] : 0.f) + out[i] + (piece.bias ? piece.bias[i] : 0.f);
  }
}

template <class L, class F, int W>
void multiply_floats_up_to(int64_t tokens, const Weight& w, const FloatPiece& piece, const float* x,
                           int64_t columns, float* y) {
  if (tokens == W) return multiply_floats<L, F, W>(w, piece, x, columns, y);
  if constexpr (W > 1)
    multiply_floats_up_to<L, F, W - 1>(tokens, w, piece, x, columns, y);
}

// A Multiply of any tokens; a token gets the same bits whatever stands beside it.
template <class L, class F>
void float_matmul(const Weight& w, const Inputs& x, const float* bias, float* y, int64_t stride,
                  int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows;
    FloatPiece piece = {w.data + tile * w.tile_bytes(), 0, 0, w.rows_of(tile),
                        stride, nullptr};
    for (; piece.from < w.columns; piece.from = piece.to) {
      const int64_t rest = w.columns - piece.from;
      piece.to = piece.from + (rest < kFloatPieceColumns ? rest : kFloatPieceColumns);
      if (bias && piece.to == w.columns) piece.bias = bias + row;
      for (int64_t token = 0; token < x.tokens; token += F::kWidth) {
        const int64_t tokens = x.tokens - token < F::kWidth ? x.tokens - token : F::kWidth;
        multiply_floats_up_to<L, F, F::kWidth>(tokens, w, piece, x.floats + token * x.columns,
                                               x.columns, y + token * stride + row);
      }
      piece.data += kFloatPieceColumns / kBlock * block_bytes(w.kind);
    }
  }
}

}  // namespace halfweave
