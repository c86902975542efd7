// A whole decoder, token ids in and final hidden states out, without a call back into Python.
#pragma once
#include <vector>

#include "cache.hpp"
#include "linear.hpp"

namespace halfweave {

// Pre-norm RMSNorm, rotary attention with shared key-value heads, gated SiLU MLP; runtime/spec.py.
struct DecoderShape {
  int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
  float norm_eps;
};

enum LinearOf { kQ, kK, kV, kO, kGate, kUp, kDown, kLinears };

struct DecoderBlock {
  const float *attention_norm, *mlp_norm;  // [hidden]
  Weight linears[kLinears];
  const float* biases[kLinears];  // null: none
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
  // The arrays stay the caller's and must outlive the decoder. `frequencies` [head_dim / 2] are
  // radians per position; embedding and head are [vocab, hidden] and may be the same.
  Decoder(const DecoderShape& shape, const std::vector<DecoderBlock>& blocks, const float* norm,
          const Weight& embedding, const Weight& head, const float* frequencies);

  // Hidden states [tokens, hidden] behind the final norm; the cache gets the tokens' keys and
  // values. The caller has checked ids, positions and pages.
  void forward(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
               float* hidden);

  // Scores [tokens, vocab] of hidden states.
  void logits(const Level& level, Pool& pool, const float* hidden, int64_t tokens, float* scores);

  const DecoderShape& shape() const { return shape_; }

 private:
  struct Run {  // tokens [first, last) of one sequence, in order
    int64_t first, last;
  };

  void attention(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                 int64_t layer);
  void attend_all(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                  int64_t layer);
  void mlp(const Level& level, Pool& pool, int64_t tokens, int64_t layer);
  void norm(const Level& level, Pool& pool, const float* gain, int64_t tokens, float* out);
  void add(Pool& pool, int64_t tokens);
  void embed(const Batch& batch);
  void find_angles(const Batch& batch);
  void find_runs(const Batch& batch);
  void reserve(const Batch& batch, int threads);

  DecoderShape shape_;
  std::vector<DecoderBlock> blocks_;
  const float *norm_, *frequencies_;
  Weight embedding_, head_;
  Linears linears_;
  std::vector<float> residual_, normed_, q_, k_, v_, attended_, gate_, up_, delta_;
  std::vector<float> cosine_, sine_, scores_;
  std::vector<Run> runs_;
  int64_t longest_ = 0;  // positions that a token of the batch attends to, at most
};

}  // namespace halfweave
