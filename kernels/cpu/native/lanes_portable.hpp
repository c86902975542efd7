// The 16 rows of a tile as plain arrays: any little-endian machine, and the model of what the other
// lanes do. Every loop does the same to each of its words, so that compilers make SSE2 or NEON of it;
// what stands in one word is taken apart by shifts, since those machines cannot all shuffle bytes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.hpp"

namespace halfweave {

struct Portable {
  static constexpr int kLanes = 16;
  static constexpr int kWidth = 4, kFloatWidth = 4, kPickWidth = 4;
  static constexpr int kFloatTurns = 1, kQueriesAtOnce = 4;
  static constexpr float kNibbleUnit = 1.f;

  struct Bytes {  // four of each lane, the first one in the lowest bits
    uint32_t of[kLanes];
  };
  struct Pairs {  // the same, or what becomes of two neighbours
    int16_t of[2 * kLanes];
  };
  struct Ints {
    int32_t of[kLanes];
  };
  struct Floats {
    float of[kLanes];
  };

  static Bytes load(const uint8_t* p) { return copied<Bytes>(p); }
  static void store(uint8_t* p, const Bytes& v) { memcpy(p, v.of, sizeof v.of); }
  static Ints load_ints(const int32_t* p) { return copied<Ints>(p); }
  static void store_ints(int32_t* p, const Ints& v) { memcpy(p, v.of, sizeof v.of); }

  static Bytes quad(const uint8_t* x) {
    const auto word = copied<uint32_t>(x);
    return each<Bytes>([&](int) { return word; });
  }
  static Bytes sixteen(const uint8_t* x) {
    Bytes v;
    for (int i = 0; i < kLanes; i += 4) memcpy(v.of + i, x, 16);
    return v;
  }
  // Each lane's bytes are two of the first four, or of the third four, and two of those behind them:
  // a selector's lowest two bits say which, and its highest one, the same in all, which four.
  static Bytes pick(const Bytes& sixteen, const Bytes& selectors) {
    uint32_t columns[4];  // column c of both fours, where a lane would have it
    const uint32_t* fours = sixteen.of + (selectors.of[0] & 8) / 4;
    for (int c = 0; c < 4; c++) {
      const uint32_t first = fours[0] >> 8 * c & 255, second = fours[1] >> 8 * c & 255;
      columns[c] = first * 0x0101 | second * 0x01010000;
    }
    return each<Bytes>([&](int i) {
      const uint32_t odd = to_masks(selectors.of[i]), upper = to_masks(selectors.of[i] >> 1);
      const uint32_t low = columns[0] ^ ((columns[0] ^ columns[1]) & odd);
      const uint32_t high = columns[2] ^ ((columns[2] ^ columns[3]) & odd);
      return low ^ ((low ^ high) & upper);
    });
  }
  static Bytes low(const Bytes& v) {
    return each<Bytes>([&](int i) {
      // Four signed nibbles at once: 7 is 0x07 and -8 is 0xF8, so bit 3 goes into the bits above.
      const uint32_t nibbles = v.of[i] & 0x0F0F0F0F, signs = nibbles & 0x08080808;
      return nibbles | ((signs << 5) - (signs << 1));
    });
  }
  static Bytes high(const Bytes& v) {
    return low(each<Bytes>([&](int i) { return v.of[i] >> 4; }));
  }
  template <int S>
  static Bytes selectors(const Bytes& indices) {
    constexpr uint32_t kBase = S & 1 ? 0x0C0C0808 : 0x04040000;
    return each<Bytes>([&](int i) { return (indices.of[i] >> 2 * S & 0x03030303) | kBase; });
  }

  // Sums of (input byte) * (code of 4 bits): those of a block's eight steps at most fit 16 bits.
  struct Narrow {
    Ints start = {};
    Pairs pairs = {};
    void add(const Bytes& x, const Bytes& codes) {
      const auto both = copied<Pairs>(&x), by = copied<Pairs>(&codes);
      for (int i = 0; i < 2 * kLanes; i++)
        pairs.of[i] += first_of(both.of[i]) * (int8_t)by.of[i] + second_of(both.of[i]) * (by.of[i] >> 8);
    }
    Ints total() const { return plus(start, sum_pairs(pairs)); }
  };
  // The same with codes of 8 bits, whose products fit 16 bits, and sums of two do not.
  struct Wide {
    static constexpr bool kSigned = false;
    Ints wide = {};
    void add(const Bytes& x, const Bytes& codes) {
      const auto both = copied<Pairs>(&x), by = copied<Pairs>(&codes);
      Pairs first, second;
      for (int i = 0; i < 2 * kLanes; i++) first.of[i] = first_of(both.of[i]) * (int8_t)by.of[i];
      for (int i = 0; i < 2 * kLanes; i++) second.of[i] = second_of(both.of[i]) * (by.of[i] >> 8);
      wide = plus(wide, plus(sum_pairs(first), sum_pairs(second)));
    }
    Ints total() const { return wide; }
  };
  struct CodeSum {
    Pairs pairs = {};
    void add(const Bytes& codes) {
      const auto both = copied<Pairs>(&codes);
      for (int i = 0; i < 2 * kLanes; i++) pairs.of[i] += (int8_t)both.of[i] + (both.of[i] >> 8);
    }
    Ints total() const { return sum_pairs(pairs); }
  };

  static Ints minus_128_times(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.of[i] - 128 * b.of[i]; });
  }
  static Ints plus(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.of[i] + b.of[i]; });
  }
  static Floats to_floats(const Ints& v) {
    return each<Floats>([&](int i) { return (float)v.of[i]; });
  }
  static Floats zero() { return all(0.f); }
  static Floats all(float v) {
    return each<Floats>([&](int) { return v; });
  }
  static Floats load_floats(const float* p) { return copied<Floats>(p); }
  static Floats load_halves(const uint16_t* p) {
    return each<Floats>([&](int i) { return half_to_float(p[i]); });
  }
  static Floats load_codes(const int8_t* p) {
    return each<Floats>([&](int i) { return (float)p[i]; });
  }
  static Floats load_bfloats(const uint16_t* p) {
    return each<Floats>([&](int i) { return bfloat_to_float(p[i]); });
  }
  static Floats four(const float* x) {
    return each<Floats>([&](int i) { return x[i % 4]; });
  }
  static Floats pick_float(const Floats& four, const Ints& indices, int shift) {
    return each<Floats>([&](int i) { return four.of[((uint32_t)indices.of[i] >> shift) & 3]; });
  }
  static void store_halves(uint16_t* p, const Floats& v) {
    for (int i = 0; i < kLanes; i++) p[i] = float_to_half(v.of[i]);
  }
  static void store_floats(float* p, const Floats& v) { memcpy(p, v.of, sizeof v.of); }
  static Floats times(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.of[i] * b.of[i]; });
  }
  static Floats plus_floats(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.of[i] + b.of[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return a.of[i] * b.of[i] + c.of[i]; });
  }
  static Floats larger(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return fmaxf(a.of[i], b.of[i]); });
  }
  static float greatest(const Floats& v) {
    float most = v.of[0];
    for (float each : v.of) most = fmaxf(most, each);
    return most;
  }
  // The larger of sizes, which begin with zeros, and of those of some floats. As integers their bits
  // are in the same order, infinity behind all numbers and what is no number last, so it stays.
  static Ints larger_size(const Ints& sizes, const Floats& v) {
    const auto bits = copied<Ints>(&v);
    return each<Ints>([&](int i) {
      const int32_t size = bits.of[i] & 0x7FFFFFFF;
      return sizes.of[i] > size ? sizes.of[i] : size;
    });
  }
  static float greatest_size(const Ints& sizes) {
    int32_t most = 0;
    for (int32_t each : sizes.of) most = each > most ? each : most;
    return copied<float>(&most);
  }
  static void store_offset_bytes(uint8_t* p, const Floats& v) {
    for (int i = 0; i < kLanes; i++) p[i] = (uint8_t)((int)lrintf(v.of[i]) + 128);
  }

 private:
  template <class T>
  static T copied(const void* p) {
    T v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T, class F>
  static T each(F&& f) {
    T v;
    for (int i = 0; i < kLanes; i++) v.of[i] = f(i);
    return v;
  }
  static int16_t first_of(int16_t both) { return both & 255; }
  static int16_t second_of(int16_t both) { return (uint16_t)both >> 8; }
  static Ints sum_pairs(const Pairs& pairs) {
    const auto both = copied<Ints>(&pairs);
    return each<Ints>([&](int i) { return (int16_t)both.of[i] + (both.of[i] >> 16); });
  }
  // 0xFF where a byte's lowest bit is set.
  static uint32_t to_masks(uint32_t bytes) {
    const uint32_t bits = bytes & 0x01010101;
    return (bits << 8) - bits;
  }
};

}  // namespace halfweave
