#include "bandwidth.hpp"

#include <cstring>

namespace halfweave {

uint64_t read_all(Pool& pool, const uint8_t* data, int64_t bytes) {
  constexpr int64_t kStride = 128;
  std::atomic<uint64_t> total{0};
  pool.run([&](int thread, int threads) {
    const int64_t end = share(bytes / kStride, thread + 1, threads) * kStride;
    uint64_t sums[kStride / 8] = {}, words[kStride / 8], sum = 0;
    for (int64_t i = share(bytes / kStride, thread, threads) * kStride; i < end; i += kStride) {
      memcpy(words, data + i, kStride);
      for (int j = 0; j < kStride / 8; j++) sums[j] += words[j];
    }
    for (uint64_t each : sums) sum += each;
    total += sum;
  });
  return total;
}

}  // namespace halfweave
