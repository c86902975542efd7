// Several tokens: a piece of a tile is taken apart once, into the first-level cache, and meets all
// tokens there, as many at a time as there are registers for their sums.
#pragma once
#include <cstring>

#include "blocks.hpp"
#include "walk.hpp"

namespace halfweave {

constexpr int64_t kPieceColumns = 512;  // of a tile; its codes and selectors take 8 KiB
constexpr int64_t kPieceBlocks = kPieceColumns / kBlock;

// A piece of one tile, taken apart.
struct Piece {
  alignas(64) uint8_t lines[kPieceColumns / 4 * kLine];   // [selectors] codes of each step
  alignas(64) int32_t offsets[kPieceBlocks * kTileRows];  // of the sums of each block
  alignas(64) float scales[kPieceBlocks * kTileRows];
  const uint8_t* steps[kPieceBlocks];  // where each block's are: in `lines`, or where they lie stored
  int64_t first, blocks;
  const uint8_t* next;  // what is read behind this piece
};

// Takes apart the columns [from, to).
template <class L, class F>
void take_apart(const Weight& w, const uint8_t* p, int64_t from, int64_t to, Piece& piece) {
  constexpr int kSlices = kTileRows / L::kLanes, kSliceBytes = kLine / kSlices;
  constexpr int kPerStep = F::kPicks ? 2 : 1;
  const auto use = [&](const uint8_t* data, const uint16_t* scales, int64_t column) {
    const int64_t block = (column - from) / kBlock;
    uint8_t* lines = piece.lines + block * F::kSteps * kPerStep * kLine;
    piece.steps[block] = F::kStoredAsUsed ? data : lines;
    for (int s = 0; s < kSlices; s++) {
      typename L::CodeSum sum;
      uint8_t* out = lines + s * kSliceBytes;
      F::each_step(data + s * kSliceBytes, [&](int, auto codes, auto selectors) {
        if (F::kPicks) L::store(out, selectors);
        if (!F::kStoredAsUsed) L::store(out + (kPerStep - 1) * kLine, codes);
        out += kPerStep * kLine;
        if (!F::kSigned) sum.add(codes);
      });
      const int64_t at = block * kTileRows + s * L::kLanes;
      const auto none = typename L::Narrow{}.total();
      L::store_ints(piece.offsets + at, L::minus_128_times(none, sum.total()));
      const auto scale = L::load_halves(scales + s * L::kLanes);
      L::store_floats(piece.scales + at, L::times(scale, L::all(1.f / F::kUnit)));
    }
  };
  piece.first = from / kBlock;
  piece.blocks = ceil_div(to - from, kBlock);
  piece.next = each_block(w, p, from, to, use);
}

// Where the results of some tokens go: the 16 rows of token t are at rows + t * stride. What they
// begin with, the same for all tokens, is `start`; null if they go on from what is there.
struct Results {
  float* rows;
  int64_t stride;
  const float* start;
};

// Adds the piece's part for W tokens, whose bytes are `x` and whose scales `scales`. Two steps at a
// time, since with a pattern both pick from the same sixteen bytes of a token.
template <class L, class F, int W>
void multiply(const Piece& piece, const uint8_t* x, const float* scales, int64_t groups,
              const Results& to) {
  constexpr int kSlices = kTileRows / L::kLanes, kSliceBytes = kLine / kSlices;
  constexpr int kPerStep = F::kPicks ? 2 : 1;
  constexpr int64_t kStride = 16 * W;
  for (int s = 0; s < kSlices; s++) {
    const uint8_t* at = x + piece.first * 2 * kStride;
    float* out = to.rows + s * L::kLanes;
    typename L::Floats totals[W];
    for (int t = 0; t < W; t++)
      totals[t] = L::load_floats(to.start ? to.start + s * L::kLanes : out + t * to.stride);
    for (int64_t block = 0; block < piece.blocks; block++, at += 2 * kStride) {
      // Loads, which the hardware fetches ahead of, pause while a piece is multiplied.
      fetch(piece.next + block * block_bytes(F::kKind), block_bytes(F::kKind));
      const uint8_t* line = piece.steps[block] + s * kSliceBytes;
      const int64_t rows = block * kTileRows + s * L::kLanes;
      const auto offset = L::load_ints(piece.offsets + rows);
      typename F::Sum sums[W];
      for (auto& sum : sums) sum = {offset};
#pragma GCC unroll 4
      for (int step = 0; step < F::kSteps; step += 2, line += 2 * kPerStep * kLine) {
        const auto first = L::load(line), second = L::load(line + kPerStep * kLine);
        const auto codes = F::kPicks ? L::load(line + kLine) : first;
        const auto more_codes = F::kPicks ? L::load(line + 3 * kLine) : second;
#pragma GCC unroll 16
        for (int t = 0; t < W; t++) {
          sums[t].add(F::input(at + 16 * t, step, first, kStride), codes);
          sums[t].add(F::input(at + 16 * t, step + 1, second, kStride), more_codes);
        }
      }
      const auto scale = L::load_floats(piece.scales + rows);
#pragma GCC unroll 16
      for (int t = 0; t < W; t++) {
        const auto both = L::times(scale, L::all(scales[t * groups + piece.first + block]));
        totals[t] = L::fma(L::to_floats(sums[t].total()), both, totals[t]);
      }
    }
    for (int t = 0; t < W; t++) L::store_floats(out + t * to.stride, totals[t]);
  }
}

template <class L, class F, int W>
void multiply_up_to(int64_t tokens, const Piece& piece, const uint8_t* x, const float* scales,
                    int64_t groups, const Results& to) {
  if (tokens == W) return multiply<L, F, W>(piece, x, scales, groups, to);
  if constexpr (W > 1) multiply_up_to<L, F, W - 1>(tokens, piece, x, scales, groups, to);
}

// The same for a tile of fewer than 16 rows.
template <class L, class F>
void multiply_ragged(int64_t tokens, const Piece& piece, const uint8_t* x, const float* scales,
                     int64_t groups, const Results& to, int64_t count) {
  alignas(64) float whole[L::kWidth * kTileRows];
  const size_t bytes = count * sizeof(float);
  for (int64_t t = 0; t < tokens; t++) memcpy(whole + t * kTileRows, to.rows + t * to.stride, bytes);
  multiply_up_to<L, F, L::kWidth>(tokens, piece, x, scales, groups, {whole, kTileRows, to.start});
  for (int64_t t = 0; t < tokens; t++) memcpy(to.rows + t * to.stride, whole + t * kTileRows, bytes);
}

// A Multiply of any tokens. Bit for bit what `matvec` gives each of them: the sums go on from piece
// to piece in one order.
template <class L, class F>
void matmul(const Weight& w, const Inputs& x, const float* bias, float* y, int64_t stride,
            int64_t first, int64_t last) {
  Piece piece;
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows, count = w.rows_of(tile);
    alignas(64) float start[kTileRows] = {};
    if (bias) memcpy(start, bias + row, count * sizeof(float));
    const uint8_t* p = w.data + tile * w.tile_bytes();
    for (int64_t from = 0; from < w.columns; from += kPieceColumns) {
      const int64_t to = from + kPieceColumns < w.columns ? from + kPieceColumns : w.columns;
      take_apart<L, F>(w, p, from, to, piece);
      p = piece.next;
      for (int64_t token = 0; token < x.tokens; token += x.width) {
        const int64_t tokens = x.tokens - token < x.width ? x.tokens - token : x.width;
        const uint8_t* bytes = x.bytes + token * x.columns;
        const float* scales = x.scales + token * x.groups();
        const Results results = {y + token * stride + row, stride, from ? nullptr : start};
        if (count == kTileRows)
          multiply_up_to<L, F, L::kWidth>(tokens, piece, bytes, scales, x.groups(), results);
        else
          multiply_ragged<L, F>(tokens, piece, bytes, scales, x.groups(), results, count);
      }
    }
  }
}

}  // namespace halfweave
