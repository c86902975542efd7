// The pool of threads under a thread sanitizer: rounds that follow each other at once, rounds that
// come when the workers have gone to sleep, and pools that close at any moment. Prints nothing and
// ends with 0, or the sanitizer says what raced.
#include "pool.hpp"

#include <chrono>
#include <cstdio>
#include <vector>

using halfweave::Pool;
using halfweave::share;

namespace {

// Every thread adds to its own part of plain memory, which the next round reads from elsewhere.
bool adds_up(Pool& pool, int rounds, bool let_sleep) {
  constexpr int64_t kCount = 1000;
  std::vector<int64_t> values(kCount, 0), shifted(kCount, 0);
  for (int round = 0; round < rounds; round++) {
    pool.run([&](int thread, int threads) {
      const int64_t end = share(kCount, thread + 1, threads);
      for (int64_t i = share(kCount, thread, threads); i < end; i++)
        shifted[i] = values[(i + kCount / 2) % kCount] + 1;
    });
    values.swap(shifted);
    if (let_sleep) std::this_thread::sleep_for(std::chrono::milliseconds(round % 4));
  }
  for (int64_t value : values)
    if (value != rounds) return false;
  return true;
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 5}) {
    Pool pool(threads);
    if (!adds_up(pool, 500, false) || !adds_up(pool, 60, true)) {
      std::fprintf(stderr, "a round of %d threads was lost or came twice\n", threads);
      return 1;
    }
  }
  for (int i = 0; i < 200; i++) {
    Pool closes_at_once(4);
    if (i % 2) closes_at_once.run([](int, int) {});
  }
  return 0;
}
