// Fills a table of kernels from a set of lanes.
#pragma once
#include "attention.hpp"
#include "level.hpp"
#include "matmul.hpp"
#include "matvec.hpp"
#include "quantize.hpp"

namespace halfweave {

template <class L>
Level make_level(const char* name) {
  return Level{
      name,
      L::kWidth,
      quantize<L>,
      {matvec<L, Sparse24Int4Block<L>>, matvec<L, Int4Block<L>>, matvec<L, Int8Block<L>>},
      {matmul<L, Sparse24Int4Block<L>>, matmul<L, Int4Block<L>>, matmul<L, Int8Block<L>>},
      rms_norm<L>,
      silu_times<L>,
      rotate<L>,
      remember<L>,
      attend<L>,
  };
}

}  // namespace halfweave
