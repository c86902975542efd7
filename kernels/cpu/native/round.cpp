#include "round.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "float_values.hpp"
#include "walk.hpp"

namespace halfweave {
namespace {

constexpr float kSmallestScale = 0x1p-14f;

// One row's part of a block, `count` floats; the codes go to line bytes `out`. Returns the scale.
uint16_t round_row(const float* values, int64_t count, uint8_t* out) {
  float most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max(most, std::fabs(values[i]));
  const uint16_t scale = float_to_half(std::max(most / 127.f, kSmallestScale));
  const float step = half_to_float(scale);
  for (int64_t i = 0; i < count; i++) {
    const float code = std::min(std::max(std::nearbyint(values[i] / step), -127.f), 127.f);
    out[i / 4 * kLine + i % 4] = (uint8_t)(int8_t)code;
  }
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
                 for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < shape.rows; r++) {
                   const int64_t row = tile * kTileRows + r;
                   const uint8_t* stored = values + (row * shape.columns + column) * size;
                   for (int64_t i = 0; i < count; i++)
                     row_values[i] = to_float(from, stored + i * size);
                   to_scales[r] = round_row(row_values, count, start + (data - start) + 4 * r);
                 }
               });
  }
}

}  // namespace halfweave
