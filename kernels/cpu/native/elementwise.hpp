// What a decoder does to single vectors between its linears: norms, activations, turns.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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

template <class L>
float greatest_of(const float* v, int64_t count) {
  auto mosts = L::all(v[0]);
  int64_t i = 0;
  for (; i + L::kLanes <= count; i += L::kLanes) mosts = L::larger(mosts, L::load_floats(v + i));
  float most = L::greatest(mosts);
  for (; i < count; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// Sums in sixteen parts, whatever the lanes: one fixed order, and one that compiles to lanes.
constexpr int kParts = 16;

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

// Softmax of v[count] in place.
template <class L>
void softmax(float* v, int64_t count) {
  const float most = greatest_of<L>(v, count);
  for (int64_t i = 0; i < count; i++) v[i] = exp_of<L>(v[i] - most);
  const float factor = 1.f / sum_of<L>(count, [&](int64_t i) { return v[i]; });
  for (int64_t i = 0; i < count; i++) v[i] *= factor;
}

// y = x / rms(x) * gain (Zhang and Sennrich, 1910.07467); y may be x.
template <class L>
void rms_norm(const float* x, const float* gain, float eps, int64_t count, float* y) {
  const float squares = sum_of<L>(count, [&](int64_t i) { return x[i] * x[i]; });
  const float factor = 1.f / sqrtf(squares / (float)count + eps);
  for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor * gain[i];
}

// y = (x - mean) / deviation * gain + bias (Ba et al., 1607.06450); y may be x.
template <class L>
void layer_norm(const float* x, const float* gain, const float* bias, float eps, int64_t count,
                float* y) {
  const float mean = sum_of<L>(count, [&](int64_t i) { return x[i]; }) / (float)count;
  const float squares =
      sum_of<L>(count, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  const float factor = 1.f / sqrtf(squares / (float)count + eps);
  for (int64_t i = 0; i < count; i++) y[i] = (x[i] - mean) * factor * gain[i] + bias[i];
}

// Numbers of api.h. kGelu is exact to what erf is here, kGeluTanh the usual approximation of it
// (both Hendrycks and Gimpel, 1606.08415).
enum Activation : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kActivations };

// erf within 2e-7: Abramowitz and Stegun, 7.1.26.
template <class L>
inline float erf_of(float x) {
  const float size = x < 0 ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float positive = 1.f - p * t * exp_of<L>(-size * size);
  return x < 0 ? -positive : positive;
}

template <class L, Activation A>
inline float activated(float x) {
  if constexpr (A == kSilu) return x / (1.f + exp_of<L>(-x));
  if constexpr (A == kGelu) return 0.5f * x * (1.f + erf_of<L>(0.70710678f * x));
  // 0.5 x (1 + tanh u) is x / (1 + e^-2u).
  if constexpr (A == kGeluTanh)
    return x / (1.f + exp_of<L>(-1.59576912f * x * (1.f + 0.044715f * x * x)));
  return x <= 0 ? 0 : x;  // what is no number stays
}

template <class L, Activation A>
void activate_as(float* x, const float* factor, int64_t count) {
  if (factor)
    for (int64_t i = 0; i < count; i++) x[i] = activated<L, A>(x[i]) * factor[i];
  else
    for (int64_t i = 0; i < count; i++) x[i] = activated<L, A>(x[i]);
}

// x = activation(x) * factor, where factor may be null: of a gated MLP, or a plain one.
template <class L>
void activate(int32_t activation, float* x, const float* factor, int64_t count) {
  if (activation == kSilu) activate_as<L, kSilu>(x, factor, count);
  if (activation == kGelu) activate_as<L, kGelu>(x, factor, count);
  if (activation == kGeluTanh) activate_as<L, kGeluTanh>(x, factor, count);
  if (activation == kRelu) activate_as<L, kRelu>(x, factor, count);
}

// Turns the first 2 * `half` dimensions of every head of x [heads, dim] in place; dimension d pairs
// with d + half.
template <class L>
void rotate(float* x, int64_t heads, int64_t dim, int64_t half, const float* cosine,
            const float* sine) {
  for (int64_t h = 0; h < heads; h++, x += dim)
    for (int64_t d = 0; d < half; d++) {
      const float first = x[d], second = x[d + half];
      x[d] = first * cosine[d] - second * sine[d];
      x[d + half] = second * cosine[d] + first * sine[d];
    }
}

}  // namespace halfweave
