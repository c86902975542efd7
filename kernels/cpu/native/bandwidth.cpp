#include "bandwidth.hpp"

#include <cstring>

#include "walk.hpp"

namespace halfweave {

uint64_t read_all(Pool& pool, const uint8_t* data, int64_t bytes) {
  std::atomic<uint64_t> total{0};
  pool.run([&](int thread, int threads) {
    const int64_t end = share(bytes / kReadBytes, thread + 1, threads) * kReadBytes;
    uint64_t sums[kReadBytes / 8] = {}, words[kReadBytes / 8], sum = 0;
    for (int64_t i = share(bytes / kReadBytes, thread, threads) * kReadBytes; i < end; i += kReadBytes) {
      fetch(data + i + kAhead, kReadBytes);
      memcpy(words, data + i, kReadBytes);
      for (int j = 0; j < kReadBytes / 8; j++) sums[j] += words[j];
    }
    for (uint64_t each : sums) sum += each;
    total += sum;
  });
  return total;
}

}  // namespace halfweave
