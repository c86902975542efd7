// How a block of floats is taken apart, a register of rows at a time; layout.hpp has pictures.
//
// A step multiplies a value of every row by an input. `each_step` calls use(step, values, indices)
// for the steps of a block and the rows of slice `s`; `input` gives the inputs of a step.
#pragma once
#include "layout.hpp"

namespace halfweave {

struct Bf16 {
  using Stored = uint16_t;
  template <class L>
  static typename L::Floats load(const Stored* p) {
    return L::load_bfloats(p);
  }
};
struct Fp16 {
  using Stored = uint16_t;
  template <class L>
  static typename L::Floats load(const Stored* p) {
    return L::load_halves(p);
  }
};
struct Fp32 {
  using Stored = float;
  template <class L>
  static typename L::Floats load(const Stored* p) {
    return L::load_floats(p);
  }
};

template <class L, class E>
struct DenseFloatBlock {
  template <class Use>
  static inline __attribute__((always_inline)) void each_step(const uint8_t* p, int s, Use&& use) {
    const auto* values = (const typename E::Stored*)p + s * L::kLanes;
#pragma GCC unroll 8
    for (int step = 0; step < kBlock; step++, values += kTileRows)
      use(step, E::template load<L>(values), 0);
  }
  static typename L::Floats input(const float* x, int step, int) { return L::all(x[step]); }
};

template <class L, class E>
struct Sparse24FloatBlock {
  static constexpr int kSteps = kBlock / 2;

  template <class Use>
  static inline __attribute__((always_inline)) void each_step(const uint8_t* p, int s, Use&& use) {
    const auto* values = (const typename E::Stored*)p + s * L::kLanes;
    const auto* bits = (const int32_t*)((const typename E::Stored*)p + kSteps * kTileRows);
    const auto indices = L::load_ints(bits + s * L::kLanes);
#pragma GCC unroll 16
    for (int step = 0; step < kSteps; step++, values += kTileRows)
      use(step, E::template load<L>(values), indices);
  }
  static typename L::Floats input(const float* x, int step, typename L::Ints indices) {
    return L::pick_float(L::four(x + step / 2 * 4), indices, 2 * step);
  }
};

}  // namespace halfweave
