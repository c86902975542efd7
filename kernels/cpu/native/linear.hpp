// Linears on all threads of a pool.
#pragma once
#include <vector>

#include "level.hpp"
#include "pool.hpp"

namespace halfweave {

// Makes room for `size` values; what is there stays, and room is never given back.
template <class T>
void grow(std::vector<T>& values, int64_t size) {
  if ((size_t)size > values.size()) values.resize(size);
}

// One linear of those that share an input: y [tokens, rows], `bias` may be null.
struct Product {
  const Weight* weight;
  const float* bias;
  float* y;
};

// Multiplies, and owns the memory of inputs in the forms that weights ask for, from call to call.
class Linears {
 public:
  // Computes products of x [tokens, columns]; their tiles are shared out as if they were one weight.
  void multiply(const Level& level, Pool& pool, const float* x, int64_t tokens, int64_t columns,
                const Product* products, int64_t count);

 private:
  void quantize(const Level& level, Pool& pool, const float* x, int64_t columns);
  void pad(const float* x, int64_t columns);

  Inputs inputs_ = {};
  std::vector<uint8_t> bytes_;
  std::vector<float> scales_, floats_;
};

}  // namespace halfweave
