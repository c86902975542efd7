// How a block of each format is taken apart, a register of rows at a time; layout.hpp has pictures.
//
// A step multiplies the four code bytes of every row by four input bytes. `each_step` calls
// use(step, codes, selectors) for the steps of a block; `input` gives the input bytes of a step.
#pragma once
#include "layout.hpp"

namespace halfweave {

template <class L>
struct Sparse24Int4Block {
  using Bytes = typename L::Bytes;
  using Sum = typename L::Narrow;
  static constexpr int32_t kKind = kSparse24Int4;
  static constexpr int kSteps = 4;
  static constexpr bool kPicks = true, kStoredAsUsed = false, kSigned = false;
  static constexpr float kUnit = L::kNibbleUnit;

  template <class Use>
  static HW_INLINE void each_step(const uint8_t* p, Use&& use) {
    const Bytes v0 = L::load(p), v1 = L::load(p + kLine), indices = L::load(p + 2 * kLine);
    use(0, L::low(v0), L::template selectors<0>(indices));
    use(1, L::high(v0), L::template selectors<1>(indices));
    use(2, L::low(v1), L::template selectors<2>(indices));
    use(3, L::high(v1), L::template selectors<3>(indices));
  }
  // `x` is the token's first sixteen bytes of the block, `stride` the way to its next sixteen.
  static Bytes input(const uint8_t* x, int step, Bytes selectors, int64_t stride) {
    return L::pick(L::sixteen(x + step / 2 * stride), selectors);
  }
};

// What the dense formats share: a step is four columns, and nothing is picked.
template <class L>
struct DenseBlock {
  using Bytes = typename L::Bytes;
  static constexpr int kSteps = 8;
  static constexpr bool kPicks = false;

  static Bytes input(const uint8_t* x, int step, Bytes, int64_t stride) {
    return L::quad(x + step / 4 * stride + step % 4 * 4);
  }
};

template <class L>
struct Int4Block : DenseBlock<L> {
  using typename DenseBlock<L>::Bytes;
  using Sum = typename L::Narrow;
  static constexpr int32_t kKind = kInt4;
  static constexpr bool kStoredAsUsed = false, kSigned = false;
  static constexpr float kUnit = L::kNibbleUnit;

  template <class Use>
  static HW_INLINE void each_step(const uint8_t* p, Use&& use) {
    for (int line = 0; line < 4; line++) {
      const Bytes v = L::load(p + line * kLine);
      use(2 * line, L::low(v), v);
      use(2 * line + 1, L::high(v), v);
    }
  }
};

template <class L>
struct Int8Block : DenseBlock<L> {
  using typename DenseBlock<L>::Bytes;
  using Sum = typename L::Wide;
  static constexpr int32_t kKind = kInt8;
  static constexpr bool kStoredAsUsed = true, kSigned = Sum::kSigned;
  static constexpr float kUnit = 1.f;

  template <class Use>
  static HW_INLINE void each_step(const uint8_t* p, Use&& use) {
    for (int line = 0; line < 8; line++) {
      const Bytes v = L::load(p + line * kLine);
      use(line, v, v);
    }
  }
};

}  // namespace halfweave
