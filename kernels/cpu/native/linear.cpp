#include "linear.hpp"

#include <algorithm>

namespace halfweave {
namespace {

constexpr int64_t kFewToQuantize = 4;  // tokens that one thread quantizes sooner than it wakes another

void multiply_part(const Level& level, const Inputs& x, const Product& product, int64_t first,
                   int64_t last) {
  const Weight& w = *product.weight;
  const Multiply multiply = x.tokens == 1 ? level.one[w.kind] : level.many[w.kind];
  multiply(w, x, product.bias, product.y, w.rows, first, last);
}

}  // namespace

void Linears::multiply(const Level& level, Pool& pool, const float* x, int64_t tokens,
                       int64_t columns, const Product* products, int64_t count) {
  inputs_.tokens = tokens;
  inputs_.columns = ceil_div(columns, kBlock) * kBlock;
  inputs_.width = ceil_div(tokens, ceil_div(tokens, level.width));  // of bundles as even as it goes
  const auto takes_floats = [](const Product& p) { return holds_floats(p.weight->kind); };
  if (!std::all_of(products, products + count, takes_floats)) quantize(level, pool, x, columns);
  if (std::any_of(products, products + count, takes_floats)) pad(x, columns);

  int64_t tiles = 0;
  for (int64_t i = 0; i < count; i++) tiles += products[i].weight->tiles();
  pool.run([&](int thread, int threads) {
    const int64_t first = share(tiles, thread, threads), last = share(tiles, thread + 1, threads);
    int64_t start = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t own = products[i].weight->tiles();
      const int64_t from = std::max(first - start, (int64_t)0), to = std::min(last - start, own);
      if (from < to) multiply_part(level, inputs_, products[i], from, to);
      start += own;
    }
  });
}

void Linears::quantize(const Level& level, Pool& pool, const float* x, int64_t columns) {
  const int64_t tokens = inputs_.tokens;
  grow(bytes_, tokens * inputs_.columns);
  grow(scales_, tokens * inputs_.groups());
  inputs_.bytes = bytes_.data();
  inputs_.scales = scales_.data();
  if (tokens <= kFewToQuantize)
    return level.quantize(x, columns, 0, tokens, inputs_, bytes_.data(), scales_.data());
  pool.run([&](int thread, int threads) {
    level.quantize(x, columns, share(tokens, thread, threads), share(tokens, thread + 1, threads),
                   inputs_, bytes_.data(), scales_.data());
  });
}

// Kernels read whole blocks: where the last one is short, rows are copied and filled up with zeros.
void Linears::pad(const float* x, int64_t columns) {
  inputs_.floats = x;
  if (columns == inputs_.columns) return;
  floats_.assign(inputs_.tokens * inputs_.columns, 0.f);
  for (int64_t t = 0; t < inputs_.tokens; t++)
    std::copy(x + t * columns, x + (t + 1) * columns, &floats_[t * inputs_.columns]);
  inputs_.floats = floats_.data();
}

}  // namespace halfweave
