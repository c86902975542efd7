// The 16 rows of a tile as two registers of eight 32-bit lanes: AVX2, FMA, F16C.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace halfweave {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kWidth = 8;          // tokens at a time: a sum each, 8 of 16 registers
  static constexpr int kFloatWidth = 6;      // the same with floats: both registers of rows at once
  static constexpr int kPickWidth = 4;       // where rows pick their inputs: one register of rows
  static constexpr int kFloatTurns = 1;
  static constexpr int kQueriesAtOnce = 4;   // queries that read a key or value together
  static constexpr float kNibbleUnit = 1.f;  // what `low` and `high` multiply a code by

  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;

  static Bytes load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void store(uint8_t* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }
  static Ints load_ints(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void store_ints(int32_t* p, Ints v) { _mm256_storeu_si256((__m256i*)p, v); }

  // Four or sixteen bytes of the input, the same for every lane or group of four lanes.
  static Bytes quad(const uint8_t* x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
  }
  static Bytes sixteen(const uint8_t* x) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)x));
  }
  static Bytes pick(Bytes sixteen, Bytes selectors) {
    return _mm256_shuffle_epi8(sixteen, selectors);
  }

  // Signed codes from the low and high nibbles of every byte.
  static Bytes low(Bytes v) {
    return _mm256_shuffle_epi8(signed_nibbles(), _mm256_and_si256(v, _mm256_set1_epi8(15)));
  }
  static Bytes high(Bytes v) { return low(_mm256_srli_epi16(v, 4)); }

  // Which of sixteen bytes each kept value of step S meets; the second eight columns when S is odd.
  template <int S>
  static Bytes selectors(Bytes indices) {
    const Bytes base = _mm256_set1_epi32(S & 1 ? 0x0C0C0808 : 0x04040000);
    const Bytes two_bits = _mm256_and_si256(_mm256_srli_epi16(indices, 2 * S), _mm256_set1_epi8(3));
    return _mm256_or_si256(two_bits, base);
  }

  // Sums of (input byte) * (code) over a block, inputs taken as 0..255. A pair of products of codes
  // of 4 bits is at most 2 * 255 * 8, so a block's eight steps at most fit sums of 16 bits.
  struct Narrow {
    Ints start = _mm256_setzero_si256(), pairs = _mm256_setzero_si256();
    void add(Bytes x, Bytes codes) {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x, codes));
    }
    Ints total() const { return plus(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
  };
  // Codes of 8 bits: products of signed inputs, since pairs of unsigned ones pass 16 bits.
  struct Wide {
    static constexpr bool kSigned = true;
    Ints wide = _mm256_setzero_si256();
    void add(Bytes x, Bytes codes) {
      const Bytes inputs = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
      const Bytes pairs =
          _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(inputs, codes));
      wide = _mm256_add_epi32(wide, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    Ints total() const { return wide; }
  };
  // Sum of codes of 4 bits, which is what an input's offset of 128 has to be taken back by; that of
  // a block's eight steps at most fits a byte.
  struct CodeSum {
    Bytes fours = _mm256_setzero_si256();
    void add(Bytes codes) { fours = _mm256_add_epi8(fours, codes); }
    Ints total() const {
      const Ints pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), fours);
      return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
  };

  static Ints minus_128_times(Ints a, Ints b) {
    return _mm256_sub_epi32(a, _mm256_slli_epi32(b, 7));
  }
  static Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats all(float v) { return _mm256_set1_ps(v); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load_halves(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
  static Floats load_codes(const int8_t* p) {
    return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static Floats load_bfloats(const uint16_t* p) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  // Four floats for every lane, and the one of them that the lane's two bits from `shift` on say.
  static Floats four(const float* x) { return _mm256_broadcast_ps((const __m128*)x); }
  static Floats pick_float(Floats four, Ints indices, int shift) {
    return _mm256_permutevar_ps(four, _mm256_srli_epi32(indices, shift));
  }
  static void store_halves(uint16_t* p, Floats v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats plus_floats(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static float greatest(Floats v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // The larger of sizes, which begin with zeros, and of those of some floats. As integers their bits
  // are in the same order, infinity behind all numbers and what is no number last, so it stays.
  static Ints larger_size(Ints sizes, Floats v) {
    const Ints bits = _mm256_castps_si256(v);
    return _mm256_max_epi32(sizes, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
  }
  static float greatest_size(Ints sizes) {
    __m128i m =
        _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    m = _mm_max_epi32(m, _mm_unpackhi_epi64(m, m));
    m = _mm_max_epi32(m, _mm_srli_epi64(m, 32));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
  }
  // 128 plus the nearest integer of each, as bytes; |v| is at most 127.
  static void store_offset_bytes(uint8_t* p, Floats v) {
    const __m256i q = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(-128));
    _mm_storel_epi64((__m128i*)p, bytes);
  }

 private:
  static Bytes signed_nibbles() {
    return _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5,
                            6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  }
};

}  // namespace halfweave
