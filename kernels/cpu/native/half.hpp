// Floats of 16 bits in plain integers, for machines without instructions for them.
#pragma once
#include <cstdint>
#include <cstring>

namespace halfweave {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3FF;
  if (exponent == 0) {  // zero and subnormals
    const float size = (float)mantissa * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t bits = exponent == 31 ? 0x7F800000u | mantissa << 13
                                       : (exponent + 112) << 23 | mantissa << 13;
  float value;
  const uint32_t all = sign | bits;
  memcpy(&value, &all, 4);
  return value;
}

inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = (uint32_t)b << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to the nearest half, ties to even.
inline uint16_t float_to_half(float value) {
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
