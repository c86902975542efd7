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
// Codes are in two's complement. Rows and columns are padded with zeros up to whole tiles and
// blocks, groups only up to whole blocks.
#pragma once
#include <cstdint>

namespace halfweave {

constexpr int64_t kTileRows = 16;
constexpr int64_t kLine = 64;
constexpr int64_t kBlock = 32;  // also the columns of an input that share a scale

enum Kind : int32_t { kSparse24Int4 = 0, kInt4 = 1, kInt8 = 2, kKinds = 3 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t block_bytes(int32_t kind) {
  return kind == kSparse24Int4 ? 3 * kLine : kind == kInt4 ? 4 * kLine : 8 * kLine;
}

// A packed weight [rows, columns]; `group` columns share a scale: 32, 64 or 128.
struct Weight {
  int32_t kind;
  int32_t group;
  int64_t rows, columns;
  const uint8_t* data;  // aligned to a line

  int64_t tiles() const { return ceil_div(rows, kTileRows); }
  int64_t blocks() const { return ceil_div(columns, kBlock); }
  int64_t groups() const { return ceil_div(columns, group); }
  int64_t tile_bytes() const {
    return blocks() * block_bytes(kind) + ceil_div(groups(), 2) * kLine;
  }
  int64_t bytes() const { return tiles() * tile_bytes(); }
};

// Inputs [tokens, columns] as bytes: x = scale * (byte - 128), a scale for 32 columns of a token.
//
// Tokens are taken `width` at a time, the last ones fewer; the bytes of one such bundle lie as
// [columns / 16][tokens of the bundle][16], so that a kernel reads them in its own order.
struct Inputs {
  int64_t tokens, columns;  // columns padded to whole blocks
  int64_t width;
  const uint8_t* bytes;
  const float* scales;  // [tokens, columns / 32]

  int64_t groups() const { return columns / kBlock; }
};

}  // namespace halfweave
