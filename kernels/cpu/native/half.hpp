// Floats of 16 bits in plain integers, for machines without instructions for them.
#pragma once
#include <cstdint>
#include <cstring>

#include "inline.hpp"

namespace halfweave {

// Without a branch, so that compilers make lanes of a loop of it.
HW_INLINE float half_to_float(uint16_t h) {
  constexpr uint32_t kBias = 112u << 23, kTop = 31u << 23;  // 127 - 15; the greatest exponent
  const uint32_t size = (uint32_t)(h & 0x7FFF) << 13, exponent = size & kTop;
  const uint32_t normal = size + kBias + (exponent == kTop ? kBias : 0);
  // Zero and subnormals: as if there were a leading one, which is then taken back.
  const uint32_t with_one = size + kBias + (1u << 23);
  float value;
  memcpy(&value, &with_one, 4);
  value -= 0x1p-14f;
  uint32_t small;
  memcpy(&small, &value, 4);
  const uint32_t all = (exponent ? normal : small) | (uint32_t)(h & 0x8000) << 16;
  memcpy(&value, &all, 4);
  return value;
}

HW_INLINE float bfloat_to_float(uint16_t b) {
  const uint32_t bits = (uint32_t)b << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to the nearest half, ties to even.
HW_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  const uint32_t size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return sign | 0x7E00;   // not a number
  if (size >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
  if (size < 0x38800000) {                       // below the smallest normal half
    float positive;
    memcpy(&positive, &size, 4);
    const float shifted = positive + 0.5f;  // its last bit is then worth 2^-24
    uint32_t rounded;
    memcpy(&rounded, &shifted, 4);
    return sign | (uint16_t)(rounded - 0x3F000000);
  }
  const uint32_t odd = (size >> 13) & 1;
  return sign | (uint16_t)((size - 0x38000000 + 0xFFF + odd) >> 13);
}

}  // namespace halfweave
