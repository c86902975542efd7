// Linears on all threads of a pool.
#pragma once
#include <vector>

#include "level.hpp"
#include "pool.hpp"

namespace halfweave {

// Inputs that were turned into bytes, and the memory they are in. Reused from call to call.
class QuantizedInputs {
 public:
  // Quantizes x [tokens, columns].
  void set(const Level& level, Pool& pool, const float* x, int64_t tokens, int64_t columns);
  const Inputs& get() const { return inputs_; }

 private:
  Inputs inputs_ = {};
  std::vector<uint8_t> bytes_;
  std::vector<float> scales_;
};

// One linear of those that share an input: y [tokens, rows], `bias` may be null.
struct Product {
  const Weight* weight;
  const float* bias;
  float* y;
};

// Computes the products; their tiles are shared out as if they were one weight.
void multiply_all(const Level& level, Pool& pool, const Inputs& x, const Product* products,
                  int64_t count);

}  // namespace halfweave
