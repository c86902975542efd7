// Inputs to bytes: per token and 32 columns one scale, so that the largest becomes 127. Where one is
// no finite number the scale is none either, and with it all that the token is multiplied by.
#pragma once
#include <cstring>

#include "layout.hpp"

namespace halfweave {

// What is smaller is taken as zero; 127 / size would be no number some way below.
constexpr float kSmallest = 1e-30f;

// Writes the tokens [first, last) of x [tokens, columns] into the places that Inputs says.
template <class L>
void quantize(const float* x, int64_t columns, int64_t first, int64_t last, const Inputs& shape,
              uint8_t* bytes, float* scales) {
  for (int64_t token = first; token < last; token++) {
    const int64_t bundle = token / shape.width * shape.width, left = shape.tokens - bundle;
    const int64_t width = left < shape.width ? left : shape.width;
    uint8_t* out = bytes + bundle * shape.columns + (token - bundle) * 16;
    for (int64_t group = 0; group < shape.groups(); group++) {
      const int64_t start = group * kBlock, left = columns - start;
      const float* values = x + token * columns + start;
      float ragged[kBlock] = {};
      if (left < kBlock) {
        memcpy(ragged, values, left * sizeof(float));
        values = ragged;
      }
      typename L::Ints most = {};
      for (int64_t i = 0; i < kBlock; i += L::kLanes)
        most = L::larger_size(most, L::load_floats(values + i));
      const float size = L::greatest_size(most);
      scales[token * shape.groups() + group] = size / 127.f;
      const auto factor = L::all(size > kSmallest ? 127.f / size : 0.f);
      alignas(64) uint8_t codes[kBlock];
      for (int64_t i = 0; i < kBlock; i += L::kLanes)
        L::store_offset_bytes(codes + i, L::times(L::load_floats(values + i), factor));
      memcpy(out + start * width, codes, 16);
      memcpy(out + start * width + 16 * width, codes + 16, 16);
    }
  }
}

}  // namespace halfweave
