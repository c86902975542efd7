// A whole decoder, token ids in and final hidden states out, without a call back into Python.
#pragma once
#include <vector>

#include "cache.hpp"
#include "linear.hpp"

namespace halfweave {

// Pre-norm blocks of attention with shared key-value heads and an MLP; runtime/spec.py.
struct DecoderShape {
  int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
  int64_t rotary_dim;  // first dimensions of a head that are turned; 0: none
  int64_t window;      // positions that a token sees, its own included; 0: all
  int64_t cache_bits;  // 16 or 8, of keys and values
  int64_t parallel;    // 1: the MLP reads the states that attention reads; 0: with what that adds
  float norm_eps;
  int32_t activation;  // elementwise.hpp
};

enum LinearOf { kQ, kK, kV, kO, kGate, kUp, kDown, kLinears };

// RMSNorm without a bias, LayerNorm with one; nothing at all without a gain.
struct Norm {
  const float *gain, *bias;
};

struct DecoderBlock {
  Norm attention_norm, mlp_norm;  // [hidden]
  const float *q_norm, *k_norm;   // [head_dim], RMSNorm of every head; null: none
  Weight linears[kLinears];       // a plain MLP has no gate: its data is null
  const float* biases[kLinears];  // null: none
};

// What is not in the blocks. Embedding and head are [vocab, hidden] and may be the same.
struct DecoderEnds {
  Weight embedding, head;
  Norm embedding_norm, norm;
  Weight positions;          // a row is added for every position, from `first_position` on
  int64_t first_position;    // of the table, which is none where its data is null
  const float* frequencies;  // [rotary_dim / 2], radians per position; may be null without
  const float* slopes;       // [heads], of linear biases; null: none
};

// Some tokens of some sequences, in any mixture; every token's own key is there when it attends.
struct Batch {
  int64_t tokens;
  const int32_t* ids;
  const int64_t* positions;
  const int32_t* pages;         // page numbers of all sequences, one behind the other
  const int64_t* pages_start;   // [tokens]: where those of a token's sequence begin
};

class Decoder {
 public:
  // The arrays stay the caller's and must outlive the decoder.
  Decoder(const DecoderShape& shape, const std::vector<DecoderBlock>& blocks,
          const DecoderEnds& ends);

  // Hidden states [tokens, hidden] behind the final norm; the cache gets the tokens' keys and
  // values. The caller has checked ids, positions and pages.
  void forward(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
               float* hidden);

  // Scores [tokens, vocab] of hidden states.
  void logits(const Level& level, Pool& pool, const float* hidden, int64_t tokens, float* scores);

  const DecoderShape& shape() const { return shape_; }

  // Positions that there is an embedding for.
  int64_t most_positions() const;

 private:
  struct Run {  // tokens [first, last) of one sequence, in order
    int64_t first, last;
  };

  void attention(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                 int64_t layer);
  void attend_all(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                  int64_t layer);
  void mlp(const Level& level, Pool& pool, int64_t tokens, int64_t layer);
  void norm(const Level& level, Pool& pool, const Norm& norm, int64_t tokens, float* out);
  void norm_heads(const Level& level, const float* gain, int64_t heads, float* x);
  void add(Pool& pool, int64_t tokens);
  void embed(const Level& level, Pool& pool, const Batch& batch);
  void find_angles(const Batch& batch);
  void find_runs(const Batch& batch);
  void reserve(const Batch& batch, int threads);

  DecoderShape shape_;
  std::vector<DecoderBlock> blocks_;
  DecoderEnds ends_;
  Linears linears_;
  std::vector<float> residual_, normed_, q_, k_, v_, attended_, gate_, up_, delta_;
  std::vector<float> cosine_, sine_, scores_;
  std::vector<Run> runs_;
  int64_t longest_ = 0;  // positions that a token of the batch attends to, at most
};

}  // namespace halfweave
