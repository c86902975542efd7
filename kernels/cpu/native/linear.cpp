#include "linear.hpp"

#include <algorithm>

namespace halfweave {
namespace {

constexpr int64_t kFewTokens = 4;  // that one thread quantizes sooner than it wakes another

void multiply_part(const Level& level, const Inputs& x, const Product& product, int64_t first,
                   int64_t last) {
  const Weight& w = *product.weight;
  if (x.tokens == 1)
    level.matvec[w.kind](w, x, product.bias, product.y, first, last);
  else
    level.matmul[w.kind](w, x, product.bias, product.y, w.rows, first, last);
}

}  // namespace

void QuantizedInputs::set(const Level& level, Pool& pool, const float* x, int64_t tokens,
                          int64_t columns) {
  inputs_.tokens = tokens;
  inputs_.columns = ceil_div(columns, kBlock) * kBlock;
  inputs_.width = level.width;
  bytes_.resize(std::max(bytes_.size(), (size_t)(tokens * inputs_.columns)));
  scales_.resize(std::max(scales_.size(), (size_t)(tokens * inputs_.groups())));
  inputs_.bytes = bytes_.data();
  inputs_.scales = scales_.data();
  if (tokens <= kFewTokens)
    return level.quantize(x, columns, 0, tokens, inputs_, bytes_.data(), scales_.data());
  pool.run([&](int thread, int threads) {
    level.quantize(x, columns, share(tokens, thread, threads), share(tokens, thread + 1, threads),
                   inputs_, bytes_.data(), scales_.data());
  });
}

void multiply_all(const Level& level, Pool& pool, const Inputs& x, const Product* products,
                  int64_t count) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; i++) tiles += products[i].weight->tiles();
  pool.run([&](int thread, int threads) {
    const int64_t first = share(tiles, thread, threads), last = share(tiles, thread + 1, threads);
    int64_t start = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t own = products[i].weight->tiles();
      const int64_t from = std::max(first - start, (int64_t)0), to = std::min(last - start, own);
      if (from < to) multiply_part(level, x, products[i], from, to);
      start += own;
    }
  });
}

}  // namespace halfweave
