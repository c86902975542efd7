// The 16 rows of a tile as one register of sixteen 32-bit lanes: AVX-512 F, BW, VL, DQ and VNNI.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace halfweave {

struct Avx512Vnni {
  static constexpr int kLanes = 16;
#ifdef HALFWEAVE_EMULATE_AVX512
  static constexpr int kWidth = 3;  // spelt out in other instructions, each width takes long to build
  static constexpr int kFloatWidth = 2, kPickWidth = 2;
#else
  static constexpr int kWidth = 12;       // tokens at a time: a sum each, 12 of 32 registers
  static constexpr int kFloatWidth = 12;  // the same with floats: two sums each
  static constexpr int kPickWidth = 10;   // where rows pick their inputs
#endif
  static constexpr int kFloatTurns = 2;
  static constexpr int kQueriesAtOnce = 8;  // queries that read a key or value together
  static constexpr float kNibbleUnit = 16.f;

  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  static Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }

  static Bytes quad(const uint8_t* x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
  }
  static Bytes sixteen(const uint8_t* x) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x));
  }
  static Bytes pick(Bytes sixteen, Bytes selectors) {
    return _mm512_shuffle_epi8(sixteen, selectors);
  }

  // Sixteen times the signed code: a nibble in the upper half of its byte needs no sign extension.
  static Bytes low(Bytes v) { return high(_mm512_slli_epi32(v, 4)); }
  static Bytes high(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8((char)0xF0)); }

  template <int S>
  static Bytes selectors(Bytes indices) {
    const Bytes base = _mm512_set1_epi32(S & 1 ? 0x0C0C0808 : 0x04040000);
    constexpr int kAndOr = 0xEA;  // (a & b) | c
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(indices, 2 * S), _mm512_set1_epi8(3), base,
                                     kAndOr);
  }

  // Products of unsigned inputs and signed codes go into 32-bit sums at once, whatever their bits.
  struct Narrow {
    Ints wide = _mm512_setzero_si512();
    void add(Bytes x, Bytes codes) { wide = _mm512_dpbusd_epi32(wide, x, codes); }
    Ints total() const { return wide; }
  };
  struct Wide : Narrow {
    static constexpr bool kSigned = false;
  };
  struct CodeSum {
    Ints wide = _mm512_setzero_si512();
    void add(Bytes codes) { wide = _mm512_dpbusd_epi32(wide, _mm512_set1_epi8(1), codes); }
    Ints total() const { return wide; }
  };

  static Ints minus_128_times(Ints a, Ints b) {
    return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 7));
  }
  static Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats all(float v) { return _mm512_set1_ps(v); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load_halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static Floats load_codes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static Floats load_bfloats(const uint16_t* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  static Floats four(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
  static Floats pick_float(Floats four, Ints indices, int shift) {
    return _mm512_permutevar_ps(four, _mm512_srli_epi32(indices, shift));
  }
  static void store_halves(uint16_t* p, Floats v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats plus_floats(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static float greatest(Floats v) { return _mm512_reduce_max_ps(v); }
  static Ints larger_size(Ints sizes, Floats v) {
    const Ints bits = _mm512_castps_si512(v);
    return _mm512_max_epi32(sizes, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
  }
  static float greatest_size(Ints sizes) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(sizes))));
  }
  static void store_offset_bytes(uint8_t* p, Floats v) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
    _mm_storeu_si128((__m128i*)p, _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
  }
};

}  // namespace halfweave
