#include "pack.hpp"

#include <cstring>

#include "walk.hpp"

namespace halfweave {
namespace {

// The code of one stored column, in two's complement; `at` counts the stored codes of a row.
int nibble(const uint8_t* row, int64_t at) { return (row[at / 2] >> (at % 2 * 4)) & 15; }
uint8_t code(const uint8_t* row, int64_t at) { return (uint8_t)((nibble(row, at) - 8) & 15); }

// One row's part of a block: columns [column, column + 32) of `stored` go to line bytes `out`.
void pack_sparse(const Weight& w, const Stored& stored, int64_t row, int64_t column,
                 uint8_t* out) {
  const uint8_t* values = stored.values + row * (w.columns / 4);
  const uint8_t* meta = stored.meta + row * ceil_div(w.columns, 8);
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

}  // namespace

void pack(const Weight& shape, const Stored& stored, uint8_t* out, int64_t first, int64_t last) {
  const auto pack_row = shape.kind == kSparse24Int4 ? pack_sparse
                        : shape.kind == kInt4       ? pack_int4
                                                    : pack_int8;
  for (int64_t tile = first; tile < last; tile++) {
    uint8_t* start = out + tile * shape.tile_bytes();
    memset(start, 0, shape.tile_bytes());
    each_block(shape, start, 0, shape.columns,
               [&](const uint8_t* data, const uint16_t* scales, int64_t column) {
                 uint8_t* to = start + (data - start);
                 auto* to_scales = (uint16_t*)(start + ((const uint8_t*)scales - start));
                 for (int64_t r = 0; r < kTileRows; r++) {
                   const int64_t row = tile * kTileRows + r;
                   if (row >= shape.rows) break;
                   to_scales[r] = stored.scales[row * shape.groups() + column / shape.group];
                   pack_row(shape, stored, row, column, to + 4 * r);
                 }
               });
  }
}

}  // namespace halfweave
