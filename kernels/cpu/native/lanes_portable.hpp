// The 16 rows of a tile as plain arrays: any machine, and the model of what the other lanes do.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.hpp"

namespace halfweave {

struct Portable {
  static constexpr int kLanes = 16;
  static constexpr int kWidth = 4, kFloatWidth = 4, kPickWidth = 4;
  static constexpr int kFloatTurns = 1, kQueries = 4;
  static constexpr float kNibbleUnit = 1.f;

  struct Bytes {
    uint8_t of[4 * kLanes];
    int code(int i) const { return (int8_t)of[i]; }
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
    return bytes([&](int i) { return x[i % 4]; });
  }
  static Bytes sixteen(const uint8_t* x) {
    return bytes([&](int i) { return x[i % 16]; });
  }
  static Bytes pick(const Bytes& sixteen, const Bytes& selectors) {
    return bytes([&](int i) { return sixteen.of[selectors.of[i] & 15]; });
  }
  static Bytes low(const Bytes& v) {
    return bytes([&](int i) { return (uint8_t)((v.of[i] & 15) ^ 8) - 8; });
  }
  static Bytes high(const Bytes& v) {
    return bytes([&](int i) { return (uint8_t)((v.of[i] >> 4) ^ 8) - 8; });
  }
  template <int S>
  static Bytes selectors(const Bytes& indices) {
    constexpr int kSecondHalf = S & 1 ? 8 : 0;
    return bytes([&](int i) {
      return kSecondHalf + (i % 4 < 2 ? 0 : 4) + ((indices.of[i] >> (2 * S)) & 3);
    });
  }

  struct Narrow {
    Ints wide = {};
    void add(const Bytes& x, const Bytes& codes) {
      for (int i = 0; i < 4 * kLanes; i++) wide.of[i / 4] += x.of[i] * codes.code(i);
    }
    Ints total() const { return wide; }
  };
  struct Wide : Narrow {
    static constexpr bool kSigned = false;
  };
  struct CodeSum {
    Ints wide = {};
    void add(const Bytes& codes) {
      for (int i = 0; i < 4 * kLanes; i++) wide.of[i / 4] += codes.code(i);
    }
    Ints total() const { return wide; }
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
  static Floats larger_size(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return fmaxf(a.of[i], fabsf(b.of[i])); });
  }
  static float greatest(const Floats& v) {
    float most = v.of[0];
    for (float each : v.of) most = fmaxf(most, each);
    return most;
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
  template <class F>
  static Bytes bytes(F&& f) {
    Bytes v;
    for (int i = 0; i < 4 * kLanes; i++) v.of[i] = (uint8_t)f(i);
    return v;
  }
  template <class T, class F>
  static T each(F&& f) {
    T v;
    for (int i = 0; i < kLanes; i++) v.of[i] = f(i);
    return v;
  }
};

}  // namespace halfweave
