#include "round.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "float_values.hpp"
#include "walk.hpp"

namespace halfweave {
namespace {

constexpr float kSmallestScale = 0x1p-14f;
constexpr float kToNearest = 12582912.f;  // 1.5 * 2^23: added, it leaves no bits behind the point

// One row's part of a block; the codes go to line bytes `out`. Returns the scale.
uint16_t round_row(const float* values, uint8_t* out) {
  float most = 0, nothing = 0;
  for (int64_t i = 0; i < kBlock; i++) {
    most = std::max(most, std::fabs(values[i]));
    nothing += values[i] * 0.f;  // no number, if any of them is none
  }
  const float wanted = std::max(most / 127.f, kSmallestScale) + nothing;
  const uint16_t scale = float_to_half(wanted);
  const float step = half_to_float(scale);
  int8_t codes[kBlock];
  for (int64_t i = 0; i < kBlock; i++) {
    const float code = std::min(std::max(-127.f, values[i] / step), 127.f);
    codes[i] = (int8_t)(int32_t)((code + kToNearest) - kToNearest);
  }
  for (int64_t i = 0; i < kBlock; i += 4) memcpy(out + i / 4 * kLine, codes + i, 4);
  return scale;
}

}  // namespace

void round_to_int8(const Weight& shape, int32_t from, const uint8_t* values, uint8_t* out,
                   int64_t first, int64_t last) {
  const int64_t size = float_bytes(from);
  float row_values[kBlock];
  for (int64_t tile = first; tile < last; tile++) {
    uint8_t* start = out + tile * shape.tile_bytes();
    memset(start, 0, shape.tile_bytes());
    each_block(shape, start, 0, shape.columns,
               [&](const uint8_t* data, const uint16_t* scales, int64_t column) {
                 auto* to_scales = (uint16_t*)(start + ((const uint8_t*)scales - start));
                 const int64_t count = std::min(shape.columns - column, kBlock);
                 std::fill(row_values + count, row_values + kBlock, 0.f);
                 for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < shape.rows; r++) {
                   const int64_t row = tile * kTileRows + r;
                   const uint8_t* stored = values + (row * shape.columns + column) * size;
                   to_floats(from, stored, count, row_values);
                   to_scales[r] = round_row(row_values, start + (data - start) + 4 * r);
                 }
               });
  }
}

}  // namespace halfweave
