#include "pack.hpp"

#include <cstring>

#include "walk.hpp"

namespace halfweave {
namespace {

// The code of one stored column, in two's complement; `at` counts the stored codes of a row.
int nibble(const uint8_t* row, int64_t at) { return (row[at / 2] >> (at % 2 * 4)) & 15; }
uint8_t code(const uint8_t* row, int64_t at) { return (uint8_t)((nibble(row, at) - 8) & 15); }

// Four nibbles, or four pairs of bits, one to a byte.
uint32_t spread_nibbles(uint32_t x) {
  return (x & 0xF) | (x & 0xF0) << 4 | (x & 0xF00) << 8 | (x & 0xF000) << 12;
}
uint32_t spread_pairs(uint32_t x) {
  return (x & 3) | (x & 12) << 6 | (x & 48) << 12 | (x & 192) << 18;
}
void store_word(uint8_t* out, uint32_t word) {
  for (int i = 0; i < 4; i++) out[i] = (uint8_t)(word >> (8 * i));
}

// One row's part of a block that lies within the row: a step's four codes are 16 bits of `values`
// and its two pairs of positions 8 bits of `meta`.
void pack_whole_sparse(const uint8_t* values, const uint8_t* meta, uint8_t* out) {
  uint32_t codes[kBlock / 8], indices = 0;
  for (int step = 0; step < kBlock / 8; step++) {
    const uint32_t stored = values[2 * step] | (uint32_t)values[2 * step + 1] << 8;
    codes[step] = spread_nibbles(stored ^ 0x8888);  // from code + 8 to two's complement
    indices |= spread_pairs(meta[step]) << (2 * step);
  }
  store_word(out, codes[0] | codes[1] << 4);
  store_word(out + kLine, codes[2] | codes[3] << 4);
  store_word(out + 2 * kLine, indices);
}

// One row's part of a block: columns [column, column + 32) of `stored` go to line bytes `out`.
void pack_sparse(const Weight& w, const Stored& stored, int64_t row, int64_t column,
                 uint8_t* out) {
  const uint8_t* values = stored.values + row * (w.columns / 4);
  const uint8_t* meta = stored.meta + row * ceil_div(w.columns, 8);
  if (column + kBlock <= w.columns)
    return pack_whole_sparse(values + column / 4, meta + column / 8, out);
  for (int64_t four = 0; four < kBlock / 4; four++) {
    const int64_t at = column / 4 + four;
    const bool there = 4 * at < w.columns;
    const int pair = there ? nibble(meta, at) : 4;  // padding keeps columns 0 and 1
    const int64_t step = four / 2;
    for (int64_t kept = 0; kept < 2; kept++) {
      const int64_t j = four % 2 * 2 + kept;
      const uint8_t bits = there ? code(values, 2 * at + kept) : 0;
      out[step / 2 * kLine + j] |= bits << (step % 2 * 4);
      out[2 * kLine + j] |= ((pair >> (2 * kept)) & 3) << (2 * step);
    }
  }
}

void pack_int4(const Weight& w, const Stored& stored, int64_t row, int64_t column, uint8_t* out) {
  const uint8_t* values = stored.values + row * (w.columns / 2);
  for (int64_t i = 0; i < kBlock && column + i < w.columns; i++)
    out[i / 8 * kLine + i % 4] |= code(values, column + i) << (i % 8 / 4 * 4);
}

void pack_int8(const Weight& w, const Stored& stored, int64_t row, int64_t column, uint8_t* out) {
  const uint8_t* values = stored.values + row * w.columns;
  for (int64_t i = 0; i < kBlock && column + i < w.columns; i++)
    out[i / 4 * kLine + i % 4] = values[column + i];
}

// As pack_sparse, of floats; `r` is the row in its tile and `out` the block.
void pack_sparse_floats(const Weight& w, const Stored& stored, int64_t row, int64_t column,
                        int64_t r, uint8_t* out) {
  const int64_t size = float_bytes(w.kind);
  const uint8_t* values = stored.values + row * (w.columns / 2) * size;
  const uint8_t* meta = stored.meta + row * ceil_div(w.columns, 8);
  uint32_t indices = 0;
  for (int64_t four = 0; four < kBlock / 4 && column + 4 * four < w.columns; four++) {
    const int64_t at = column / 4 + four;
    for (int64_t kept = 0; kept < 2; kept++) {
      const int64_t step = 2 * four + kept;
      memcpy(out + (step * kTileRows + r) * size, values + (2 * at + kept) * size, size);
      indices |= (uint32_t)((nibble(meta, at) >> (2 * kept)) & 3) << (2 * step);
    }
  }
  memcpy(out + kBlock / 2 * kTileRows * size + 4 * r, &indices, sizeof indices);
}

void pack_dense_floats(const Weight& w, const Stored& stored, int64_t row, int64_t column,
                       int64_t r, uint8_t* out) {
  const int64_t size = float_bytes(w.kind);
  const uint8_t* values = stored.values + (row * w.columns + column) * size;
  for (int64_t i = 0; i < kBlock && column + i < w.columns; i++)
    memcpy(out + (i * kTileRows + r) * size, values + i * size, size);
}

void pack_floats(const Weight& w, const Stored& stored, int64_t tile, uint8_t* start) {
  const auto pack_row = is_sparse(w.kind) ? pack_sparse_floats : pack_dense_floats;
  each_float_block(w, start, [&](const uint8_t* data, int64_t column) {
    for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < w.rows; r++)
      pack_row(w, stored, tile * kTileRows + r, column, r, start + (data - start));
  });
}

void pack_codes(const Weight& w, const Stored& stored, int64_t tile, uint8_t* start) {
  const auto pack_row = w.kind == kSparse24Int4 ? pack_sparse
                        : w.kind == kInt4       ? pack_int4
                                                : pack_int8;
  each_block(w, start, 0, w.columns,
             [&](const uint8_t* data, const uint16_t* scales, int64_t column) {
               auto* to_scales = (uint16_t*)(start + ((const uint8_t*)scales - start));
               for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < w.rows; r++) {
                 const int64_t row = tile * kTileRows + r;
                 to_scales[r] = stored.scales[row * w.groups() + column / w.group];
                 pack_row(w, stored, row, column, start + (data - start) + 4 * r);
               }
             });
}

}  // namespace

void pack(const Weight& shape, const Stored& stored, uint8_t* out, int64_t first, int64_t last) {
  const auto pack_tile = holds_floats(shape.kind) ? pack_floats : pack_codes;
  for (int64_t tile = first; tile < last; tile++) {
    uint8_t* start = out + tile * shape.tile_bytes();
    memset(start, 0, shape.tile_bytes());
    pack_tile(shape, stored, tile, start);
  }
}

}  // namespace halfweave
