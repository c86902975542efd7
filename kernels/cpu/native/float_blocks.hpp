// How a block of floats is taken apart, a register of rows at a time; layout.hpp has pictures.
//
// A step multiplies a value of every row by an input of every token: `values` gives the rows of
// slice `s`, `inputs` what the rows of a token have in common, `pick` what a slice takes of that.
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
struct FloatBlock {
  static typename L::Floats values(const uint8_t* p, int step, int s) {
    return E::template load<L>((const typename E::Stored*)p + step * kTileRows + s * L::kLanes);
  }
};

template <class L, class E>
struct DenseFloatBlock : FloatBlock<L, E> {
  using Floats = typename L::Floats;
  static constexpr int kSteps = kBlock, kWidth = L::kFloatWidth;
  static constexpr int kTogether = kTileRows / L::kLanes;
  struct Indices {};

  static Indices indices(const uint8_t*, int) { return {}; }
  static Floats inputs(const float* x, int step) { return L::all(x[step]); }
  static Floats pick(Floats inputs, Indices, int) { return inputs; }
};

template <class L, class E>
struct Sparse24FloatBlock : FloatBlock<L, E> {
  using Floats = typename L::Floats;
  using Indices = typename L::Ints;
  static constexpr int kSteps = kBlock / 2, kWidth = L::kPickWidth, kTogether = 1;

  static Indices indices(const uint8_t* p, int s) {
    const auto* behind = (const typename E::Stored*)p + kSteps * kTileRows;
    return L::load_ints((const int32_t*)behind + s * L::kLanes);
  }
  static Floats inputs(const float* x, int step) { return L::four(x + step / 2 * 4); }
  static Floats pick(Floats four, Indices indices, int step) {
    return L::pick_float(four, indices, 2 * step);
  }
};

}  // namespace halfweave
