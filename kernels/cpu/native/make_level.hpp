// Fills a table of kernels from a set of lanes.
#pragma once
#include "attention.hpp"
#include "float_matmul.hpp"
#include "level.hpp"
#include "matmul.hpp"
#include "matvec.hpp"
#include "quantize.hpp"

namespace halfweave {

template <class L, class F>
void add_codes(Level& level) {
  level.one[F::kKind] = matvec<L, F>;
  level.many[F::kKind] = matmul<L, F>;
}

template <class L, class E>
void add_floats(Level& level, int32_t sparse, int32_t dense) {
  level.one[sparse] = level.many[sparse] = float_matmul<L, Sparse24FloatBlock<L, E>>;
  level.one[dense] = level.many[dense] = float_matmul<L, DenseFloatBlock<L, E>>;
}

template <class L>
Level make_level(const char* name) {
  Level level = {name,          L::kWidth,   quantize<L>, {},          {},       rms_norm<L>,
                 layer_norm<L>, activate<L>, rotate<L>,   remember<L>, attend<L>};
  add_codes<L, Sparse24Int4Block<L>>(level);
  add_codes<L, Int4Block<L>>(level);
  add_codes<L, Int8Block<L>>(level);
  add_floats<L, Bf16>(level, kSparse24Bf16, kDenseBf16);
  add_floats<L, Fp16>(level, kSparse24Fp16, kDenseFp16);
  add_floats<L, Fp32>(level, kSparse24Fp32, kDenseFp32);
  return level;
}

}  // namespace halfweave
