#include "pool.hpp"

#include <chrono>

namespace halfweave {
namespace {

constexpr int kPauses = 64;  // between two looks at the clock
constexpr std::chrono::microseconds kAlone(5);    // a piece of work mostly comes within that
constexpr std::chrono::microseconds kAwake(500);  // and the next token, which Python chooses

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits without sleeping: whether it came. For a few microseconds it gives the core to nobody, then to
// whoever asks: where cores are fewer than threads, the one that is waited for needs this one.
template <class Came>
bool spin(const Came& came) {
  const auto pauses = [&] {
    for (int i = 0; i < kPauses; i++) {
      if (came()) return true;
      pause();
    }
    return false;
  };
  if (pauses()) return true;  // the clock costs nothing then
  const auto start = std::chrono::steady_clock::now();
  for (auto now = start; now < start + kAwake; now = std::chrono::steady_clock::now()) {
    if (now >= start + kAlone) std::this_thread::yield();
    if (pauses()) return true;
  }
  return false;
}

}  // namespace

Pool::Pool(int threads) {
  try {
    workers_.reserve(threads - 1);
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // a thread that is not joined would end the process
    close();
    throw;
  }
}

Pool::~Pool() { close(); }

void Pool::close() {
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
  const auto done = [&] { return !left_.load(std::memory_order_acquire); };
  if (spin(done)) return;
  while (!done()) std::this_thread::yield();  // a worker has lost its core
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
  const auto called = [&] { return round_.load() != seen || closing_; };
  if (!spin(called)) {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, called);
    asleep_.fetch_sub(1);
  }
  return round_.load();
}

}  // namespace halfweave
