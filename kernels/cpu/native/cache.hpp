// Keys and values of all sequences, in pages of 16 positions that any sequence may own.
//
// A page holds, per layer and key-value head: keys [dim][16 positions], so that the scores of 16
// positions are lanes, and values [16 positions][dim]; both as fp16.
#pragma once
#include "layout.hpp"

namespace halfweave {

constexpr int64_t kPagePositions = 16;

struct Cache {
  uint16_t* data;
  int64_t pages, layers, kv_heads;
  int64_t dim, true_dim;  // of a head: padded to 16, and as the model says

  static int64_t padded(int64_t dim) { return ceil_div(dim, 16) * 16; }
  int64_t head_size() const { return 2 * dim * kPagePositions; }
  int64_t page_size() const { return layers * kv_heads * head_size(); }  // in halves

  uint16_t* keys(int64_t page, int64_t layer, int64_t head) const {
    return data + page * page_size() + (layer * kv_heads + head) * head_size();
  }
  uint16_t* values(int64_t page, int64_t layer, int64_t head) const {
    return keys(page, layer, head) + dim * kPagePositions;
  }
};

constexpr int64_t kQueries = 4;  // that look at the same keys and values at a time

// One head of one token, which sees the first `count` positions of its sequence.
struct Query {
  const float* q;  // [true_dim]
  float* out;      // [true_dim]
  float* scores;   // room for the positions that any query beside it sees, rounded up to pages
  int64_t count;
};

}  // namespace halfweave
