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
constexpr int kShares = 8;                // of the largest, that int4 scales are tried at
constexpr float kLeastShare = 0.7f, kShareStep = 0.05f;

uint16_t to_scale(float wanted) { return float_to_half(std::max(wanted, kSmallestScale)); }

// The codes of a block for a scale; their squared error.
float round_block(const float* values, float step, float least, float most, int8_t* codes) {
  float error = 0;
  for (int64_t i = 0; i < kBlock; i++) {
    const float clamped = std::min(std::max(least, values[i] / step), most);
    const float code = (clamped + kToNearest) - kToNearest;
    codes[i] = (int8_t)(int32_t)code;
    error += (values[i] - code * step) * (values[i] - code * step);
  }
  return error;
}

// One row's part of a block; the codes go to line bytes `out`. Returns the scale.
uint16_t round_int8(const float* values, float largest, uint8_t* out) {
  const uint16_t scale = to_scale(largest / 127.f);
  int8_t codes[kBlock];
  round_block(values, half_to_float(scale), -127.f, 127.f, codes);
  for (int64_t i = 0; i < kBlock; i += 4) memcpy(out + i / 4 * kLine, codes + i, 4);
  return scale;
}

uint16_t round_int4(const float* values, float largest, uint8_t* out) {
  uint16_t best_scale = 0;
  float least_error = INFINITY;
  int8_t codes[kBlock], best[kBlock] = {};
  for (int i = 0; i < kShares; i++) {
    const uint16_t scale = to_scale((kLeastShare + kShareStep * (float)i) * largest / 7.f);
    const float error = round_block(values, half_to_float(scale), -8.f, 7.f, codes);
    if (error < least_error || i == 0) {
      least_error = error;
      best_scale = scale;
      memcpy(best, codes, sizeof best);
    }
  }
  for (int64_t i = 0; i < kBlock; i++)
    out[i / 8 * kLine + i % 4] |= (uint8_t)((best[i] & 15) << (i % 8 / 4 * 4));
  return best_scale;
}

// The largest size among a block's values; no number, if any of them is no finite one.
float largest_of(const float* values) {
  float largest = 0, nothing = 0;
  for (int64_t i = 0; i < kBlock; i++) {
    largest = std::max(largest, std::fabs(values[i]));
    nothing += values[i] * 0.f;
  }
  return largest + nothing;
}

}  // namespace

void round_weight(const Weight& shape, int32_t from, const uint8_t* values, uint8_t* out,
                  int64_t first, int64_t last) {
  constexpr uint16_t kNoNumber = 0x7E00;
  const auto round_row = shape.kind == kInt4 ? round_int4 : round_int8;
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
                   const float largest = largest_of(row_values);
                   to_scales[r] = std::isfinite(largest)
                                      ? round_row(row_values, largest, start + (data - start) + 4 * r)
                                      : kNoNumber;
                 }
               });
  }
}

}  // namespace halfweave
