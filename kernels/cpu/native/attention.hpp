// Everything that stands between the linears of a decoder block.
#pragma once
#include <cmath>
#include <cstring>

#include "cache.hpp"

namespace halfweave {

// e^x within 2e-7 of its size, for x in [-87, 88]; straight code that a compiler makes lanes of.
template <class L>
inline float exp_of(float x) {
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the last bits are an integer
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  float p = 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

// Sixteen partial results, whatever the lanes: one fixed order, and one that compiles to lanes.
constexpr int kParts = 16;

template <class L>
float greatest_of(const float* v, int64_t count) {
  float parts[kParts], most = v[0];
  for (float& part : parts) part = v[0];
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int j = 0; j < kParts; j++) parts[j] = v[i + j] > parts[j] ? v[i + j] : parts[j];
  for (; i < count; i++) most = v[i] > most ? v[i] : most;
  for (float part : parts) most = part > most ? part : most;
  return most;
}

template <class L, class Term>
inline float sum_of(int64_t count, const Term& term) {
  float parts[kParts] = {}, total = 0;
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int j = 0; j < kParts; j++) parts[j] += term(i + j);
  for (; i < count; i++) total += term(i);
  for (float part : parts) total += part;
  return total;
}

// y = x / rms(x) * gain (Zhang and Sennrich, 1910.07467).
template <class L>
void rms_norm(const float* x, const float* gain, float eps, int64_t count, float* y) {
  const float squares = sum_of<L>(count, [&](int64_t i) { return x[i] * x[i]; });
  const float factor = 1.f / std::sqrt(squares / (float)count + eps);
  for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor * gain[i];
}

// gate = silu(gate) * up.
template <class L>
void silu_times(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.f + exp_of<L>(-gate[i])) * up[i];
}

// Softmax of v[count] in place.
template <class L>
void softmax(float* v, int64_t count) {
  const float most = greatest_of<L>(v, count);
  for (int64_t i = 0; i < count; i++) v[i] = exp_of<L>(v[i] - most);
  const float total = sum_of<L>(count, [&](int64_t i) { return v[i]; });
  for (int64_t i = 0; i < count; i++) v[i] /= total;
}

// The scores of 16 positions of one page for N queries: q . k, not yet divided by anything.
template <class L, int N>
inline void page_scores(const Query* queries, const uint16_t* keys, int64_t dim, int64_t at) {
  constexpr int kSlices = kPagePositions / L::kLanes;
  typename L::Floats sums[N][kSlices];
  for (auto& query : sums)
    for (auto& sum : query) sum = L::zero();
  for (int64_t d = 0; d < dim; d++)
    for (int s = 0; s < kSlices; s++) {
      const auto key = L::load_halves(keys + d * kPagePositions + s * L::kLanes);
      for (int n = 0; n < N; n++) sums[n][s] = L::fma(L::all(queries[n].q[d]), key, sums[n][s]);
    }
  for (int n = 0; n < N; n++)
    for (int s = 0; s < kSlices; s++)
      L::store_floats(queries[n].scores + at + s * L::kLanes, sums[n][s]);
}

// The mean of the first `most` positions' values, weighted by the scores, for N queries and 16
// dimensions from `d` on.
template <class L, int N>
inline void mix_values(const Query* queries, const Cache& cache, const int32_t* pages,
                       int64_t layer, int64_t kv_head, int64_t most, int64_t d) {
  constexpr int kSlices = 16 / L::kLanes;
  typename L::Floats sums[N][kSlices];
  for (auto& query : sums)
    for (auto& sum : query) sum = L::zero();
  for (int64_t start = 0; start < most; start += kPagePositions) {
    const uint16_t* value = cache.values(pages[start / kPagePositions], layer, kv_head) + d;
    const int64_t end = most - start < kPagePositions ? most - start : kPagePositions;
    for (int64_t i = 0; i < end; i++, value += cache.dim)
      for (int s = 0; s < kSlices; s++) {
        const auto part = L::load_halves(value + s * L::kLanes);
        for (int n = 0; n < N; n++)
          sums[n][s] = L::fma(L::all(queries[n].scores[start + i]), part, sums[n][s]);
      }
  }
  const int64_t left = cache.true_dim - d < 16 ? cache.true_dim - d : 16;
  for (int n = 0; n < N; n++) {
    float buffer[16];
    for (int s = 0; s < kSlices; s++) L::store_floats(buffer + s * L::kLanes, sums[n][s]);
    for (int64_t i = 0; i < left; i++) queries[n].out[d + i] = buffer[i];
  }
}

// N queries of one sequence by one pair of keys and values (Ainslie et al., 2305.13245). What one
// gets does not depend on the others: those that see less give what they do not see no weight.
template <class L, int N>
void attend_together(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
                     const Query* queries) {
  int64_t most = 0;
  for (int n = 0; n < N; n++) most = queries[n].count > most ? queries[n].count : most;
  for (int64_t at = 0; at < most; at += kPagePositions)
    page_scores<L, N>(queries, cache.keys(pages[at / kPagePositions], layer, kv_head),
                      cache.true_dim, at);
  const float factor = 1.f / std::sqrt((float)cache.true_dim);
  for (int n = 0; n < N; n++) {
    const Query& query = queries[n];
    for (int64_t i = 0; i < query.count; i++) query.scores[i] *= factor;
    softmax<L>(query.scores, query.count);
    for (int64_t i = query.count; i < most; i++) query.scores[i] = 0;
  }
  for (int64_t d = 0; d < cache.dim; d += 16)
    mix_values<L, N>(queries, cache, pages, layer, kv_head, most, d);
}

template <class L, int N = kQueries>
void attend(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
            const Query* queries, int64_t count) {
  if (count == N) return attend_together<L, N>(cache, pages, layer, kv_head, queries);
  if constexpr (N > 1) attend<L, N - 1>(cache, pages, layer, kv_head, queries, count);
}

// Turns q [heads, true_dim] and k [kv_heads, true_dim] in place; dimension d pairs with d + dim / 2.
template <class L>
void rotate(float* x, int64_t heads, int64_t dim, const float* cosine, const float* sine) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; h++, x += dim)
    for (int64_t d = 0; d < half; d++) {
      const float first = x[d], second = x[d + half];
      x[d] = first * cosine[d] - second * sine[d];
      x[d + half] = second * cosine[d] + first * sine[d];
    }
}

// Stores one position's keys and values [kv_heads, true_dim] as halves.
template <class L>
void remember(const Cache& cache, int32_t page, int64_t slot, int64_t layer, const float* k,
              const float* v) {
  for (int64_t h = 0; h < cache.kv_heads; h++, k += cache.true_dim, v += cache.true_dim) {
    uint16_t* keys = cache.keys(page, layer, h);
    uint16_t* values = cache.values(page, layer, h) + slot * cache.dim;
    for (int64_t d = 0; d < cache.dim; d += L::kLanes) {
      float pad_k[L::kLanes] = {}, pad_v[L::kLanes] = {};
      for (int64_t i = 0; i < L::kLanes && d + i < cache.true_dim; i++) {
        pad_k[i] = k[d + i];
        pad_v[i] = v[d + i];
      }
      uint16_t halves[L::kLanes];
      L::store_halves(halves, L::load_floats(pad_k));
      for (int64_t i = 0; i < L::kLanes; i++) keys[(d + i) * kPagePositions + slot] = halves[i];
      L::store_halves(values + d, L::load_floats(pad_v));
    }
  }
}

}  // namespace halfweave
