// Stored floats of any of the dense kinds, as fp32.
#pragma once
#include "half.hpp"
#include "layout.hpp"

namespace halfweave {

template <class Convert>
void convert(const uint8_t* stored, int64_t count, float* out, const Convert& to_float) {
  uint16_t bits;
  for (int64_t i = 0; i < count; i++) {
    memcpy(&bits, stored + i * sizeof bits, sizeof bits);
    out[i] = to_float(bits);
  }
}

// `count` of them, one behind the other.
inline void to_floats(int32_t kind, const uint8_t* stored, int64_t count, float* out) {
  if (kind == kDenseFp32) return (void)memcpy(out, stored, count * sizeof(float));
  if (kind == kDenseBf16) return convert(stored, count, out, bfloat_to_float);
  convert(stored, count, out, half_to_float);
}

}  // namespace halfweave
