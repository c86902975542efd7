// How a packed weight lies in memory. One layout for all instruction sets; see docs/cpu.md.
//
// A tile is 16 output rows, which are the 16 32-bit lanes of a line of 64 bytes. A tile is one
// sequential stream, because two streams make the hardware's prefetcher stall:
//
//   [16 fp16 scales of group 0 | 16 of group 1] [blocks of group 0] [blocks of group 1]
//   [16 fp16 scales of group 2 | 16 of group 3] [blocks of group 2] ...
//
// A block is 32 input columns of the tile, in lines of 64 bytes; byte 4 r + j belongs to row r.
//
//   sparse24_int4   V0 V1 I     192 bytes. A step is 8 columns, of which every row keeps 4.
//                               V0's low nibbles are step 0, its high ones step 1; V1: steps 2, 3.
//                               Bits 2 s and 2 s + 1 of I: which of its four columns step s's
//                               kept value j comes from; j = 0, 1 of the first four, 2, 3 of the
//                               second.
//   int4            V0 .. V3    256 bytes. Line l, column 8 l + j: low nibbles, + 4: high ones.
//   int8            V0 .. V7    512 bytes. Line l holds columns 4 l + j.
//
// Formats of floats have no scales, so a tile is [block] [block] ... Here a value of all 16 rows
// lies together, in 32 bytes (bf16, fp16) or 64 (fp32):
//
//   dense           V0 .. V31   a value for each column.
//   sparse24        V0 .. V15   V(2 f + j): what every row kept of its four columns f, j = 0, 1.
//                   I           64 bytes, 32 bits a row. Bits 2 s and 2 s + 1: which of its four
//                               columns Vs comes from.
//
// Codes are in two's complement. Rows and columns are padded with zeros up to whole tiles and
// blocks, groups only up to whole blocks.
#pragma once
#include <cstdint>

#include "inline.hpp"

namespace halfweave {

constexpr int64_t kTileRows = 16;
constexpr int64_t kLine = 64;
constexpr int64_t kBlock = 32;  // also the columns of an input that share a scale

enum Kind : int32_t {
  kSparse24Int4 = 0,
  kInt4 = 1,
  kInt8 = 2,
  kSparse24Bf16 = 3,  // from here on floats
  kSparse24Fp16 = 4,
  kSparse24Fp32 = 5,
  kDenseBf16 = 6,
  kDenseFp16 = 7,
  kDenseFp32 = 8,
  kKinds = 9
};

HW_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HW_INLINE constexpr bool holds_floats(int32_t kind) { return kind >= kSparse24Bf16; }
HW_INLINE constexpr bool is_sparse(int32_t kind) {
  return kind == kSparse24Int4 || (holds_floats(kind) && kind < kDenseBf16);
}
HW_INLINE constexpr int64_t float_bytes(int32_t kind) {
  return kind == kSparse24Fp32 || kind == kDenseFp32 ? 4 : 2;
}
HW_INLINE constexpr int64_t block_bytes(int32_t kind) {
  if (holds_floats(kind))
    return float_bytes(kind) * kTileRows * kBlock / (is_sparse(kind) ? 2 : 1) +
           (is_sparse(kind) ? kLine : 0);
  return kind == kSparse24Int4 ? 3 * kLine : kind == kInt4 ? 4 * kLine : 8 * kLine;
}

// A packed weight [rows, columns]; `group` columns share a scale: 32, 64 or 128. Floats have no
// scales, and any of these groups.
struct Weight {
  int32_t kind;
  int32_t group;
  int64_t rows, columns;
  const uint8_t* data;  // aligned to a line

  HW_INLINE int64_t tiles() const { return ceil_div(rows, kTileRows); }
  HW_INLINE int64_t rows_of(int64_t tile) const {
    return rows - tile * kTileRows < kTileRows ? rows - tile * kTileRows : kTileRows;
  }
  HW_INLINE int64_t blocks() const { return ceil_div(columns, kBlock); }
  HW_INLINE int64_t groups() const { return ceil_div(columns, group); }
  HW_INLINE int64_t tile_bytes() const {
    const int64_t scales = holds_floats(kind) ? 0 : ceil_div(groups(), 2) * kLine;
    return blocks() * block_bytes(kind) + scales;
  }
  HW_INLINE int64_t bytes() const { return tiles() * tile_bytes(); }
};

// Inputs [tokens, columns], as bytes, as floats or as both: what the weights ask for that they meet.
//
// Bytes: x = scale * (byte - 128), a scale for 32 columns of a token. Tokens are taken `width` at a
// time, the last ones fewer; the bytes of one such bundle lie as [columns / 16][tokens of the
// bundle][16], so that a kernel reads them in its own order.
struct Inputs {
  int64_t tokens, columns;  // columns padded to whole blocks
  int64_t width;
  const uint8_t* bytes;
  const float* scales;  // [tokens, columns / 32]
  const float* floats;  // [tokens, columns]

  HW_INLINE int64_t groups() const { return columns / kBlock; }
};

}  // namespace halfweave
