// AVX-512 on machines that lack it: SIMDe spells its instructions out in others, and what SIMDe
// 0.7.4 does not have yet stands here. Included before everything else.
#pragma once
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstring>

#include "half.hpp"

namespace emulated {

template <class T, class V>
void spread(const V& v, T* out) {
  memcpy(out, &v, sizeof v);
}

template <class V, class T>
V gather(const T* values) {
  V v;
  memcpy(&v, values, sizeof v);
  return v;
}

inline simde__m512 cvtph_ps(simde__m256i v) {
  uint16_t halves[16];
  spread(v, halves);
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = halfweave::half_to_float(halves[i]);
  return gather<simde__m512>(out);
}
inline simde__m256i cvtps_ph(simde__m512 v) {
  float in[16];
  spread(v, in);
  uint16_t out[16];
  for (int i = 0; i < 16; i++) out[i] = halfweave::float_to_half(in[i]);
  return gather<simde__m256i>(out);
}
inline simde__m512i cvtps_epi32(simde__m512 v) {
  float in[16];
  spread(v, in);
  int32_t out[16];
  for (int i = 0; i < 16; i++) out[i] = (int32_t)lrintf(in[i]);
  return gather<simde__m512i>(out);
}
inline simde__m512 cvtepi32_ps(simde__m512i v) {
  int32_t in[16];
  spread(v, in);
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = (float)in[i];
  return gather<simde__m512>(out);
}
inline simde__m512i cvtepi8_epi32(simde__m128i v) {
  int8_t in[16];
  spread(v, in);
  int32_t out[16];
  for (int i = 0; i < 16; i++) out[i] = in[i];
  return gather<simde__m512i>(out);
}
inline simde__m512i cvtepu16_epi32(simde__m256i v) {
  uint16_t in[16];
  spread(v, in);
  int32_t out[16];
  for (int i = 0; i < 16; i++) out[i] = in[i];
  return gather<simde__m512i>(out);
}
inline simde__m512 broadcast_f32x4(simde__m128 v) {
  float in[4];
  spread(v, in);
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = in[i % 4];
  return gather<simde__m512>(out);
}
inline simde__m512 permutevar_ps(simde__m512 v, simde__m512i indices) {
  float in[16];
  int32_t at[16];
  spread(v, in);
  spread(indices, at);
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = in[i / 4 * 4 + (at[i] & 3)];
  return gather<simde__m512>(out);
}
inline simde__m128i cvtepi32_epi8(simde__m512i v) {
  int32_t in[16];
  spread(v, in);
  int8_t out[16];
  for (int i = 0; i < 16; i++) out[i] = (int8_t)in[i];
  return gather<simde__m128i>(out);
}
inline float reduce_max(simde__m512 v) {
  float in[16];
  spread(v, in);
  float most = in[0];
  for (float each : in) most = fmaxf(most, each);
  return most;
}
inline int32_t reduce_max_epi32(simde__m512i v) {
  int32_t in[16];
  spread(v, in);
  int32_t most = in[0];
  for (int32_t each : in) most = each > most ? each : most;
  return most;
}

}  // namespace emulated

#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_broadcast_f32x4
#undef _mm512_permutevar_ps
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_max_epi32
#define _mm512_cvtph_ps(v) emulated::cvtph_ps(v)
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_cvtps_epi32(v) emulated::cvtps_epi32(v)
#define _mm512_cvtepi32_ps(v) emulated::cvtepi32_ps(v)
#define _mm512_cvtepi32_epi8(v) emulated::cvtepi32_epi8(v)
#define _mm512_cvtepi8_epi32(v) emulated::cvtepi8_epi32(v)
#define _mm512_cvtepu16_epi32(v) emulated::cvtepu16_epi32(v)
#define _mm512_broadcast_f32x4(v) emulated::broadcast_f32x4(v)
#define _mm512_permutevar_ps(v, indices) emulated::permutevar_ps(v, indices)
#define _mm512_reduce_max_ps(v) emulated::reduce_max(v)
#define _mm512_reduce_max_epi32(v) emulated::reduce_max_epi32(v)
