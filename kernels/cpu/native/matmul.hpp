// Several tokens: a piece of a tile is taken apart once, into the first-level cache, and meets all
// tokens there, as many at a time as there are registers for their sums.
#pragma once
#include "blocks.hpp"
#include "walk.hpp"

namespace halfweave {

constexpr int64_t kPieceColumns = 512;  // of a tile; its codes and selectors take 8 KiB
constexpr int64_t kPieceBlocks = kPieceColumns / kBlock;

// A piece of one tile, taken apart: one register of rows behind the other.
struct Piece {
  alignas(64) uint8_t lines[kPieceColumns / 4 * kLine];   // per slice: [selectors] codes, by step
  alignas(64) int32_t offsets[kPieceBlocks * kTileRows];  // of the sums of each block
  alignas(64) float scales[kPieceBlocks * kTileRows];
  int64_t first, blocks;
};

// Takes apart the columns [from, to); returns where the tile's stream goes on.
template <class L, class F>
const uint8_t* take_apart(const Weight& w, const uint8_t* p, int64_t from, int64_t to,
                          Piece& piece) {
  constexpr int kSlices = kTileRows / L::kLanes, kSliceBytes = kLine / kSlices;
  constexpr int kPerStep = F::kPicks ? 2 : 1;
  constexpr int64_t kBlockLines = F::kSteps * kPerStep * kSliceBytes;
  piece.first = from / kBlock;
  piece.blocks = ceil_div(to - from, kBlock);
  return each_block(w, p, from, to,
                    [&](const uint8_t* data, const uint16_t* scales, int64_t column) {
                      const int64_t block = (column - from) / kBlock;
                      for (int s = 0; s < kSlices; s++) {
                        typename L::CodeSum sum;
                        uint8_t* out = piece.lines + s * (sizeof piece.lines / kSlices) +
                                       block * kBlockLines;
                        F::each_step(data + s * kSliceBytes, [&](int, auto codes, auto selectors) {
                          if (F::kPicks) L::store(out, selectors);
                          L::store(out + (kPerStep - 1) * kSliceBytes, codes);
                          out += kPerStep * kSliceBytes;
                          if (!F::kSigned) sum.add(codes);
                        });
                        const int64_t at = block * kTileRows + s * L::kLanes;
                        const auto none = typename L::Narrow{}.total();
                        L::store_ints(piece.offsets + at, L::minus_128_times(none, sum.total()));
                        const auto scale = L::load_halves(scales + s * L::kLanes);
                        L::store_floats(piece.scales + at, L::times(scale, L::all(1.f / F::kUnit)));
                      }
                    });
}

// Adds the piece's part to out[W][16] for W tokens, whose bytes are `x` and whose scales `scales`.
template <class L, class F, int W>
void multiply(const Piece& piece, const uint8_t* x, const float* scales, int64_t groups,
              float* out) {
  constexpr int kSlices = kTileRows / L::kLanes, kSliceBytes = kLine / kSlices;
  constexpr int kPerStep = F::kPicks ? 2 : 1;
  constexpr int64_t kStride = 16 * W;
  for (int s = 0; s < kSlices; s++) {
    const uint8_t* line = piece.lines + s * (sizeof piece.lines / kSlices);
    const uint8_t* at = x + piece.first * 2 * kStride;
    for (int64_t block = 0; block < piece.blocks; block++, at += 2 * kStride) {
      typename F::Sum sums[W];
#pragma GCC unroll 8
      for (int step = 0; step < F::kSteps; step++, line += kPerStep * kSliceBytes) {
        const auto first = L::load(line);
        const auto codes = F::kPicks ? L::load(line + kSliceBytes) : first;
#pragma GCC unroll 16
        for (int t = 0; t < W; t++)
          sums[t].add(F::input(at + 16 * t, step, first, kStride), codes);
      }
      const int64_t rows = block * kTileRows + s * L::kLanes;
      const auto offset = L::load_ints(piece.offsets + rows);
      const auto scale = L::load_floats(piece.scales + rows);
#pragma GCC unroll 16
      for (int t = 0; t < W; t++) {
        auto total = sums[t].total();
        if (!F::kSigned) total = L::plus(total, offset);
        float* to = out + t * kTileRows + s * L::kLanes;
        const auto both = L::times(scale, L::all(scales[t * groups + piece.first + block]));
        L::store_floats(to, L::fma(L::to_floats(total), both, L::load_floats(to)));
      }
    }
  }
}

template <class L, class F, int W>
void multiply_up_to(int64_t tokens, const Piece& piece, const uint8_t* x, const float* scales,
                    int64_t groups, float* out) {
  if (tokens == W) return multiply<L, F, W>(piece, x, scales, groups, out);
  if constexpr (W > 1) multiply_up_to<L, F, W - 1>(tokens, piece, x, scales, groups, out);
}

// A Multiply of any tokens. Bit for bit what `matvec` gives each of them: the sums go on from piece
// to piece in one order.
template <class L, class F>
void matmul(const Weight& w, const Inputs& x, const float* bias, float* y, int64_t stride,
            int64_t first, int64_t last) {
  Piece piece;
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows;
    const int64_t count = w.rows - row < kTileRows ? w.rows - row : kTileRows;
    const uint8_t* p = w.data + tile * w.tile_bytes();
    for (int64_t from = 0; from < w.columns; from += kPieceColumns) {
      const int64_t to = from + kPieceColumns < w.columns ? from + kPieceColumns : w.columns;
      p = take_apart<L, F>(w, p, from, to, piece);
      for (int64_t token = 0; token < x.tokens; token += x.width) {
        const int64_t tokens = x.tokens - token < x.width ? x.tokens - token : x.width;
        alignas(64) float out[L::kWidth * kTileRows] = {};
        float* rows = y + token * stride + row;
        for (int64_t t = 0; from && t < tokens; t++)
          for (int64_t i = 0; i < count; i++) out[t * kTileRows + i] = rows[t * stride + i];
        multiply_up_to<L, F, L::kWidth>(tokens, piece, x.bytes + token * x.columns,
                                        x.scales + token * x.groups(), x.groups(), out);
        const float* added = bias && to == w.columns ? bias + row : nullptr;
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t i = 0; i < count; i++)
            rows[t * stride + i] = out[t * kTileRows + i] + (added ? added[i] : 0.f);
      }
    }
  }
}

}  // namespace halfweave
