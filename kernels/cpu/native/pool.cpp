#include "pool.hpp"

namespace halfweave {
namespace {

constexpr int kSpins = 20000;  // some tens of microseconds

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run_erased(Call call, const void* task) {
  if (workers_.empty()) return call(task, 0, 1);
  call_ = call;
  task_ = task;
  left_.store((int)workers_.size(), std::memory_order_relaxed);
  // Sequentially consistent with `asleep_`: either a worker sees the round or we see it asleep.
  round_.fetch_add(1);
  if (asleep_.load()) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  call(task, 0, size());
  for (int spins = 0; left_.load(std::memory_order_acquire); spins++) {
    if (spins < kSpins)
      pause();
    else
      std::this_thread::yield();  // a worker has lost its core
  }
}

void Pool::work(int thread) {
  for (uint64_t seen = 0;;) {
    seen = next_round(seen);
    if (closing_) return;
    call_(task_, thread, size());
    left_.fetch_sub(1, std::memory_order_release);
  }
}

uint64_t Pool::next_round(uint64_t seen) {
  for (int spins = 0; spins < kSpins; spins++) {
    const uint64_t round = round_.load(std::memory_order_acquire);
    if (round != seen || closing_) return round;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1);
  wake_.wait(lock, [&] { return round_.load() != seen || closing_; });
  asleep_.fetch_sub(1);
  return round_.load();
}

}  // namespace halfweave
