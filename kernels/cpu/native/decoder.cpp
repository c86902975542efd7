#include "decoder.hpp"

#include <algorithm>
#include <cmath>

#include "embedding.hpp"

namespace halfweave {
namespace {

constexpr int64_t kRunTokens = 16;  // of one sequence that one thread attends for in one go
constexpr int64_t kFewInTurn = 2;   // tokens that one is done with sooner than it wakes another

// Calls use(token) for every token, on all threads where that pays.
template <class Use>
void each_token(Pool& pool, int64_t tokens, const Use& use) {
  if (tokens <= kFewInTurn) {
    for (int64_t t = 0; t < tokens; t++) use(t);
    return;
  }
  pool.run([&](int thread, int threads) {
    const int64_t end = share(tokens, thread + 1, threads);
    for (int64_t t = share(tokens, thread, threads); t < end; t++) use(t);
  });
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape, const std::vector<DecoderBlock>& blocks,
                 const DecoderEnds& ends)
    : shape_(shape), blocks_(blocks), ends_(ends) {}

int64_t Decoder::most_positions() const {
  return ends_.positions.data ? ends_.positions.rows - ends_.first_position : INT64_MAX;
}

void Decoder::forward(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                      float* hidden) {
  reserve(batch, pool.size());
  embed(level, pool, batch);
  find_angles(batch);
  find_runs(batch);
  for (int64_t layer = 0; layer < shape_.layers; layer++) {
    norm(level, pool, blocks_[layer].attention_norm, batch.tokens, normed_.data());
    attention(level, pool, batch, cache, layer);
    if (!shape_.parallel) add(pool, batch.tokens);
    norm(level, pool, blocks_[layer].mlp_norm, batch.tokens, normed_.data());
    if (shape_.parallel) add(pool, batch.tokens);
    mlp(level, pool, batch.tokens, layer);
    add(pool, batch.tokens);
  }
  norm(level, pool, ends_.norm, batch.tokens, hidden);
}

void Decoder::logits(const Level& level, Pool& pool, const float* hidden, int64_t tokens,
                     float* scores) {
  const Product product = {&ends_.head, nullptr, scores};
  linears_.multiply(level, pool, hidden, tokens, shape_.hidden, &product, 1);
}

void Decoder::attention(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                        int64_t layer) {
  const DecoderBlock& block = blocks_[layer];
  const int64_t dim = shape_.head_dim, heads = shape_.heads, kv_heads = shape_.kv_heads;
  const int64_t half = shape_.rotary_dim / 2;
  const Product qkv[] = {{&block.linears[kQ], block.biases[kQ], q_.data()},
                         {&block.linears[kK], block.biases[kK], k_.data()},
                         {&block.linears[kV], block.biases[kV], v_.data()}};
  linears_.multiply(level, pool, normed_.data(), batch.tokens, shape_.hidden, qkv, 3);
  each_token(pool, batch.tokens, [&](int64_t t) {
    float *q = &q_[t * heads * dim], *k = &k_[t * kv_heads * dim];
    norm_heads(level, block.q_norm, heads, q);
    norm_heads(level, block.k_norm, kv_heads, k);
    const float *cosine = cosine_.data() + t * half, *sine = sine_.data() + t * half;
    level.rotate(q, heads, dim, half, cosine, sine);
    level.rotate(k, kv_heads, dim, half, cosine, sine);
    const int64_t position = batch.positions[t];
    const int32_t page = batch.pages[batch.pages_start[t] + position / kPagePositions];
    level.remember(cache, page, position % kPagePositions, layer, k, &v_[t * kv_heads * dim]);
  });
  attend_all(level, pool, batch, cache, layer);
  const Product o = {&block.linears[kO], block.biases[kO], delta_.data()};
  linears_.multiply(level, pool, attended_.data(), batch.tokens, heads * dim, &o, 1);
}

// Tokens that stand one behind the other in a sequence, and heads that share keys and values, look
// at them together.
void Decoder::attend_all(const Level& level, Pool& pool, const Batch& batch, const Cache& cache,
                         int64_t layer) {
  const int64_t dim = shape_.head_dim, heads = shape_.heads, kv_heads = shape_.kv_heads;
  const int64_t sharing = heads / kv_heads, parts = (int64_t)runs_.size() * kv_heads;
  pool.run([&](int thread, int threads) {
    float* scores = &scores_[thread * kQueries * longest_];
    // Later runs of a sequence see more, so every thread takes some of all.
    for (int64_t part = thread; part < parts; part += threads) {
      const Run& run = runs_[part / kv_heads];
      const int64_t kv_head = part % kv_heads, all = (run.last - run.first) * sharing;
      Query queries[kQueries];
      for (int64_t start = 0; start < all; start += kQueries) {
        const int64_t count = std::min(all - start, kQueries);
        for (int64_t i = 0; i < count; i++) {
          const int64_t t = run.first + (start + i) / sharing;
          const int64_t head = kv_head * sharing + (start + i) % sharing;
          const int64_t at = (t * heads + head) * dim, last = batch.positions[t] + 1;
          const int64_t first = shape_.window ? std::max(last - shape_.window, (int64_t)0) : 0;
          queries[i] = {&q_[at], &attended_[at], scores + i * longest_,
                        first,   last,           ends_.slopes ? ends_.slopes[head] : 0.f};
        }
        level.attend(cache, batch.pages + batch.pages_start[run.first], layer, kv_head, queries,
                     count);
      }
    }
  });
}

void Decoder::mlp(const Level& level, Pool& pool, int64_t tokens, int64_t layer) {
  const DecoderBlock& block = blocks_[layer];
  const bool gated = block.linears[kGate].data;
  // A plain MLP's only vector is activated where a gated one's gate is.
  const Product both[] = {
      {&block.linears[kUp], block.biases[kUp], gated ? up_.data() : gate_.data()},
      {&block.linears[kGate], block.biases[kGate], gate_.data()}};
  linears_.multiply(level, pool, normed_.data(), tokens, shape_.hidden, both, gated ? 2 : 1);
  each_token(pool, tokens, [&](int64_t t) {
    level.activate(shape_.activation, &gate_[t * shape_.ffn],
                   gated ? &up_[t * shape_.ffn] : nullptr, shape_.ffn);
  });
  const Product down = {&block.linears[kDown], block.biases[kDown], delta_.data()};
  linears_.multiply(level, pool, gate_.data(), tokens, shape_.ffn, &down, 1);
}

void Decoder::norm(const Level& level, Pool& pool, const Norm& norm, int64_t tokens, float* out) {
  const int64_t hidden = shape_.hidden;
  each_token(pool, tokens, [&](int64_t t) {
    const float* x = &residual_[t * hidden];
    if (norm.bias)
      level.layer_norm(x, norm.gain, norm.bias, shape_.norm_eps, hidden, out + t * hidden);
    else
      level.rms_norm(x, norm.gain, shape_.norm_eps, hidden, out + t * hidden);
  });
}

void Decoder::norm_heads(const Level& level, const float* gain, int64_t heads, float* x) {
  if (!gain) return;
  for (int64_t h = 0; h < heads; h++, x += shape_.head_dim)
    level.rms_norm(x, gain, shape_.norm_eps, shape_.head_dim, x);
}

void Decoder::add(Pool& pool, int64_t tokens) {
  const int64_t hidden = shape_.hidden;
  each_token(pool, tokens, [&](int64_t t) {
    for (int64_t i = t * hidden; i < (t + 1) * hidden; i++) residual_[i] += delta_[i];
  });
}

void Decoder::embed(const Level& level, Pool& pool, const Batch& batch) {
  for (int64_t t = 0; t < batch.tokens; t++) {
    unpack_row(ends_.embedding, batch.ids[t], &residual_[t * shape_.hidden]);
    if (ends_.positions.data)
      unpack_row(ends_.positions, batch.positions[t] + ends_.first_position,
                 &delta_[t * shape_.hidden]);
  }
  if (ends_.positions.data) add(pool, batch.tokens);
  if (ends_.embedding_norm.gain)
    norm(level, pool, ends_.embedding_norm, batch.tokens, residual_.data());
}

void Decoder::find_runs(const Batch& batch) {
  runs_.clear();
  for (int64_t t = 0; t < batch.tokens; t++) {
    const bool follows = t && batch.pages_start[t] == batch.pages_start[t - 1] &&
                         batch.positions[t] == batch.positions[t - 1] + 1;
    if (follows && t - runs_.back().first < kRunTokens)
      runs_.back().last = t + 1;
    else
      runs_.push_back({t, t + 1});
  }
}

void Decoder::find_angles(const Batch& batch) {
  const int64_t half = shape_.rotary_dim / 2;
  for (int64_t t = 0; t < batch.tokens; t++)
    for (int64_t d = 0; d < half; d++) {
      const float angle = (float)batch.positions[t] * ends_.frequencies[d];
      cosine_[t * half + d] = std::cos(angle);
      sine_[t * half + d] = std::sin(angle);
    }
}

void Decoder::reserve(const Batch& batch, int threads) {
  const int64_t n = batch.tokens, dim = shape_.head_dim;
  for (auto* values : {&residual_, &normed_, &delta_}) grow(*values, n * shape_.hidden);
  for (auto* values : {&q_, &attended_}) grow(*values, n * shape_.heads * dim);
  for (auto* values : {&k_, &v_}) grow(*values, n * shape_.kv_heads * dim);
  for (auto* values : {&gate_, &up_}) grow(*values, n * shape_.ffn);
  for (auto* values : {&cosine_, &sine_}) grow(*values, n * (shape_.rotary_dim / 2));
  longest_ = 0;
  for (int64_t t = 0; t < n; t++) longest_ = std::max(longest_, batch.positions[t] + 1);
  longest_ = ceil_div(longest_, kPagePositions) * kPagePositions;
  grow(scores_, threads * kQueries * longest_);
}

}  // namespace halfweave
