// Keys and values: stored in pages, and looked at by queries.
#pragma once
#include <cfloat>

#include "cache.hpp"
#include "elementwise.hpp"
#include "quantize.hpp"

namespace halfweave {

// What a page's keys and values are stored as; `Part` is one number.
template <class L>
struct HalfPages {
  using Part = uint16_t;
  static constexpr bool kScaled = false;
  static typename L::Floats load(const Part* p) { return L::load_halves(p); }
};
template <class L>
struct CodePages {
  using Part = int8_t;
  static constexpr bool kScaled = true;
  static typename L::Floats load(const Part* p) { return L::load_codes(p); }
};

// Sums that a processor can add to side by side, none waiting for itself.
constexpr int kSumsAtOnce = 8;

// How many pages, or sixteens of dimensions, N queries look at in one go for that.
template <class L, int N>
constexpr int side_by_side() {
  constexpr int kOfOne = N * (16 / L::kLanes);
  return kOfOne >= kSumsAtOnce ? 1 : kSumsAtOnce / kOfOne;
}

// The scores of the 16 positions of each of G pages for N queries: q . k, not yet divided by anything.
template <class L, class P, int N, int G>
inline void page_scores(const Query* queries, const Cache& cache, const int32_t* pages,
                        int64_t layer, int64_t kv_head, int64_t at) {
  constexpr int kSlices = kPagePositions / L::kLanes;
  const typename P::Part* keys[G];
  for (int g = 0; g < G; g++)
    keys[g] = (const typename P::Part*)cache.keys(pages[at / kPagePositions + g], layer, kv_head);
  typename L::Floats sums[N][G][kSlices];
  for (auto& query : sums)
    for (auto& page : query)
      for (auto& sum : page) sum = L::zero();
  for (int64_t d = 0; d < cache.true_dim; d++)
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 2
      for (int s = 0; s < kSlices; s++) {
        const auto key = P::load(keys[g] + d * kPagePositions + s * L::kLanes);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
          sums[n][g][s] = L::fma(L::all(queries[n].q[d]), key, sums[n][g][s]);
      }
  for (int g = 0; g < G; g++, at += kPagePositions)
    for (int s = 0; s < kSlices; s++)
      for (int n = 0; n < N; n++) {
        if constexpr (P::kScaled) {
          const float* scales = cache.key_scales(pages[at / kPagePositions], layer, kv_head);
          sums[n][g][s] = L::times(sums[n][g][s], L::load_floats(scales + s * L::kLanes));
        }
        L::store_floats(queries[n].scores + at + s * L::kLanes, sums[n][g][s]);
      }
}

// What some queries see: all of them the positions [first, last), and some [least, most).
struct Sight {
  int64_t least, first, last, most;
};

HW_INLINE Sight sight_of(const Query* queries, int64_t count) {
  Sight all = {queries[0].first, queries[0].first, queries[0].last, queries[0].last};
  for (int64_t n = 1; n < count; n++) {
    all.least = queries[n].first < all.least ? queries[n].first : all.least;
    all.first = queries[n].first > all.first ? queries[n].first : all.first;
    all.last = queries[n].last < all.last ? queries[n].last : all.last;
    all.most = queries[n].last > all.most ? queries[n].last : all.most;
  }
  if (all.last < all.first) all.last = all.first;  // nothing that all see
  return all;
}

// Calls use(position, value) for the positions [first, last), `value` being theirs from `d` on.
template <class P, class Use>
HW_INLINE void each_value(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
                          int64_t d, int64_t first, int64_t last, Use&& use) {
  while (first < last) {
    const int64_t slot = first % kPagePositions, rest = first - slot + kPagePositions;
    const int64_t end = rest < last ? rest : last;
    const auto* value =
        (const typename P::Part*)cache.values(pages[first / kPagePositions], layer, kv_head) +
        slot * cache.dim + d;
    for (; first < end; first++, value += cache.dim) use(first, value);
  }
}

// The sum of the values that each of N queries sees, weighted by its scores, for G times 16
// dimensions from `d` on. What one does not see is not added to it with a weight of zero, since it
// may be no number.
template <class L, class P, int N, int G>
inline void mix_values(const Query* queries, const Cache& cache, const int32_t* pages,
                       int64_t layer, int64_t kv_head, const Sight& sight, int64_t d) {
  using Part = typename P::Part;
  constexpr int kSlices = 16 * G / L::kLanes;
  typename L::Floats sums[N][kSlices];
  for (auto& query : sums)
    for (auto& sum : query) sum = L::zero();
  const auto add_to_some = [&](int64_t at, const Part* value) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      if (at < queries[n].first || at >= queries[n].last) continue;
      const auto score = L::all(queries[n].scores[at]);
#pragma GCC unroll 8
      for (int s = 0; s < kSlices; s++)
        sums[n][s] = L::fma(score, P::load(value + s * L::kLanes), sums[n][s]);
    }
  };
  const auto add_to_all = [&](int64_t at, const Part* value) {
#pragma GCC unroll 8
    for (int s = 0; s < kSlices; s++) {
      const auto part = P::load(value + s * L::kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++)
        sums[n][s] = L::fma(L::all(queries[n].scores[at]), part, sums[n][s]);
    }
  };
  each_value<P>(cache, pages, layer, kv_head, d, sight.least, sight.first, add_to_some);
  each_value<P>(cache, pages, layer, kv_head, d, sight.first, sight.last, add_to_all);
  each_value<P>(cache, pages, layer, kv_head, d, sight.last, sight.most, add_to_some);
  const int64_t left = cache.true_dim - d < 16 * G ? cache.true_dim - d : 16 * G;
  for (int n = 0; n < N; n++) {
    float buffer[16 * G];
    for (int s = 0; s < kSlices; s++) L::store_floats(buffer + s * L::kLanes, sums[n][s]);
    for (int64_t i = 0; i < left; i++) queries[n].out[d + i] = buffer[i];
  }
}

// Products q . k to weights that sum to one, of what the query sees.
template <class L>
void to_weights(const Query& query, float factor) {
  float* scores = query.scores;
  for (int64_t i = query.first; i < query.last; i++) scores[i] *= factor;
  if (query.slope != 0)
    for (int64_t i = query.first; i < query.last; i++)
      scores[i] -= query.slope * (float)(query.last - 1 - i);
  softmax<L>(scores + query.first, query.last - query.first);
}

// N queries of one sequence by one pair of keys and values (Ainslie et al., 2305.13245). What one
// gets does not depend on the others, nor on what it does not see itself.
template <class L, class P, int N>
void attend_together(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
                     const Query* queries) {
  const Sight sight = sight_of(queries, N);
  constexpr int G = side_by_side<L, N>();
  int64_t at = sight.least - sight.least % kPagePositions;
  for (; at + G * kPagePositions <= sight.most; at += G * kPagePositions)
    page_scores<L, P, N, G>(queries, cache, pages, layer, kv_head, at);
  for (; at < sight.most; at += kPagePositions)
    page_scores<L, P, N, 1>(queries, cache, pages, layer, kv_head, at);
  const float factor = 1.f / sqrtf((float)cache.true_dim);
  for (int n = 0; n < N; n++) {
    to_weights<L>(queries[n], factor);
    if constexpr (P::kScaled)
      for (int64_t i = queries[n].first; i < queries[n].last; i++)
        queries[n].scores[i] *= cache.value_scales(pages[i / kPagePositions], layer,
                                                   kv_head)[i % kPagePositions];
  }
  int64_t d = 0;
  for (; d + 16 * G <= cache.dim; d += 16 * G)
    mix_values<L, P, N, G>(queries, cache, pages, layer, kv_head, sight, d);
  for (; d < cache.dim; d += 16)
    mix_values<L, P, N, 1>(queries, cache, pages, layer, kv_head, sight, d);
}

template <class L, class P, int N>
void attend_some(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
                 const Query* queries, int64_t count) {
  if (count == N) return attend_together<L, P, N>(cache, pages, layer, kv_head, queries);
  if constexpr (N > 1) attend_some<L, P, N - 1>(cache, pages, layer, kv_head, queries, count);
}

template <class L, class P>
void attend_as(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
               const Query* queries, int64_t count) {
  for (int64_t i = 0; i < count; i += L::kQueriesAtOnce) {
    const int64_t some = count - i < L::kQueriesAtOnce ? count - i : L::kQueriesAtOnce;
    attend_some<L, P, L::kQueriesAtOnce>(cache, pages, layer, kv_head, queries + i, some);
  }
}

// At most kQueries queries, of which L::kQueriesAtOnce read a key or value together.
template <class L>
void attend(const Cache& cache, const int32_t* pages, int64_t layer, int64_t kv_head,
            const Query* queries, int64_t count) {
  if (cache.bits == 8)
    attend_as<L, CodePages<L>>(cache, pages, layer, kv_head, queries, count);
  else
    attend_as<L, HalfPages<L>>(cache, pages, layer, kv_head, queries, count);
}

// Writes x [size], filled up with zeros to `padded`, as halves that stand `stride` apart.
template <class L>
void store_halves(const float* x, int64_t size, int64_t padded, uint16_t* out, int64_t stride) {
  for (int64_t d = 0; d < padded; d += L::kLanes) {
    float filled[L::kLanes] = {};
    for (int64_t i = 0; i < L::kLanes && d + i < size; i++) filled[i] = x[d + i];
    uint16_t halves[L::kLanes];
    L::store_halves(halves, L::load_floats(filled));
    for (int64_t i = 0; i < L::kLanes; i++) out[(d + i) * stride] = halves[i];
  }
}

// The same as codes; returns what to multiply them by. What is not finite makes the scale so.
template <class L>
float store_codes(const float* x, int64_t size, int64_t padded, int8_t* out, int64_t stride) {
  float most = 0;
  for (int64_t i = 0; i < size; i++) {
    const float length = fabsf(x[i]);
    if (length > most || length != length) most = length;
  }
  const bool usable = most > kSmallest && most <= FLT_MAX;
  const float inverse = usable ? 127.f / most : 0.f;
  for (int64_t d = 0; d < padded; d++)
    out[d * stride] = usable && d < size ? (int8_t)lrintf(x[d] * inverse) : 0;
  return most / 127.f;
}

// Stores one position's keys and values [kv_heads, true_dim].
template <class L>
void remember(const Cache& cache, int32_t page, int64_t slot, int64_t layer, const float* k,
              const float* v) {
  const int64_t size = cache.true_dim, padded = cache.dim;
  for (int64_t h = 0; h < cache.kv_heads; h++, k += size, v += size) {
    uint8_t *keys = cache.keys(page, layer, h), *values = cache.values(page, layer, h);
    if (cache.bits == 8) {
      cache.key_scales(page, layer, h)[slot] =
          store_codes<L>(k, size, padded, (int8_t*)keys + slot, kPagePositions);
      cache.value_scales(page, layer, h)[slot] =
          store_codes<L>(v, size, padded, (int8_t*)values + slot * padded, 1);
    } else {
      store_halves<L>(k, size, padded, (uint16_t*)keys + slot, kPagePositions);
      store_halves<L>(v, size, padded, (uint16_t*)values + slot * padded, 1);
    }
  }
}

}  // namespace halfweave
