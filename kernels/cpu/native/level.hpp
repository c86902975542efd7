// The kernels of one instruction set. Each level_*.cpp is compiled with flags of its own and makes
// one; nothing else in this library may contain instructions that a plain machine lacks.
#pragma once
#include "cache.hpp"
#include "layout.hpp"

namespace halfweave {

// y [tokens, rows] = x W^T + bias for the rows of the tiles [first, last); consecutive tokens of y
// are `stride` apart, and `bias` may be null.
using Multiply = void (*)(const Weight& w, const Inputs& x, const float* bias, float* y,
                          int64_t stride, int64_t first, int64_t last);

struct Level {
  const char* name;
  int64_t width;  // tokens in a bundle of Inputs, at most

  void (*quantize)(const float* x, int64_t columns, int64_t first, int64_t last,
                   const Inputs& shape, uint8_t* bytes, float* scales);
  Multiply one[kKinds], many[kKinds];  // for one token and for several

  // What stands between the linears of a block; elementwise.hpp and attention.hpp.
  void (*rms_norm)(const float* x, const float* gain, float eps, int64_t count, float* y);
  void (*layer_norm)(const float* x, const float* gain, const float* bias, float eps,
                     int64_t count, float* y);
  void (*activate)(int32_t activation, float* x, const float* factor, int64_t count);
  void (*rotate)(float* x, int64_t heads, int64_t dim, int64_t half, const float* cosine,
                 const float* sine);
  void (*remember)(const Cache& cache, int32_t page, int64_t slot, int64_t layer, const float* k,
                   const float* v);
  void (*attend)(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
                 const Query* queries, int64_t count);
};

// Null where this build has no such level.
const Level* portable_level();
const Level* avx2_level();
const Level* avx512_vnni_level();

// The level of that name, or the best one for null; null if this machine cannot run it.
const Level* find_level(const char* name);

}  // namespace halfweave
