// Stored floats of any of the dense kinds, as fp32.
#pragma once
#include "half.hpp"
#include "layout.hpp"

namespace halfweave {

inline float to_float(int32_t kind, const uint8_t* value) {
  if (kind == kDenseFp32) {
    float found;
    memcpy(&found, value, sizeof found);
    return found;
  }
  uint16_t bits;
  memcpy(&bits, value, sizeof bits);
  return kind == kDenseBf16 ? bfloat_to_float(bits) : half_to_float(bits);
}

}  // namespace halfweave
