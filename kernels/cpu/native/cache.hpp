// Keys and values of all sequences, in pages of 16 positions that any sequence may own.
//
// A page holds, per layer and key-value head: keys [dim][16 positions], so that the scores of 16
// positions are lanes, and values [16 positions][dim]. Both are fp16; or int8, and behind them stand
// fp32 scales, of 16 keys and then of 16 values.
#pragma once
#include "layout.hpp"

namespace halfweave {

constexpr int64_t kPagePositions = 16;

struct Cache {
  uint8_t* data;
  int64_t pages, layers, kv_heads;
  int64_t dim, true_dim;  // of a head: padded to 16, and as the model says
  int64_t bits;           // 16 or 8

  HW_INLINE static int64_t padded(int64_t dim) { return ceil_div(dim, 16) * 16; }
  // Of keys, or of values.
  HW_INLINE int64_t half_bytes() const { return dim * kPagePositions * bits / 8; }
  HW_INLINE int64_t scale_bytes() const {
    return bits == 8 ? 2 * kPagePositions * (int64_t)sizeof(float) : 0;
  }
  HW_INLINE int64_t head_bytes() const { return 2 * half_bytes() + scale_bytes(); }
  HW_INLINE int64_t page_bytes() const { return layers * kv_heads * head_bytes(); }

  HW_INLINE uint8_t* keys(int64_t page, int64_t layer, int64_t head) const {
    return data + page * page_bytes() + (layer * kv_heads + head) * head_bytes();
  }
  HW_INLINE uint8_t* values(int64_t page, int64_t layer, int64_t head) const {
    return keys(page, layer, head) + half_bytes();
  }
  HW_INLINE float* key_scales(int64_t page, int64_t layer, int64_t head) const {
    return (float*)(keys(page, layer, head) + 2 * half_bytes());
  }
  HW_INLINE float* value_scales(int64_t page, int64_t layer, int64_t head) const {
    return key_scales(page, layer, head) + kPagePositions;
  }
};

constexpr int64_t kQueries = 8;  // that one call of `attend` is for, at most

// One head of one token, which sees the positions [first, last) of its sequence.
struct Query {
  const float* q;  // [true_dim]
  float* out;      // [true_dim]
  float* scores;   // room for the positions that any query beside it sees, rounded up to pages
  int64_t first, last;
  float slope;  // what a position's distance takes from its score (Press et al., 2108.12409)
};

}  // namespace halfweave
