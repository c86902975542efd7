// A few threads that share the work of one caller: they stay awake for half a millisecond after a
// piece of work, because the next comes microseconds later, and the next token soon; then they sleep,
// because the machine is not ours.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace halfweave {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return (int)workers_.size() + 1; }

  // Calls task(thread, threads) on every thread and returns when all have. One caller at a time.
  template <class Task>
  void run(const Task& task) {
    run_erased([](const void* t, int i, int n) { (*(const Task*)t)(i, n); }, &task);
  }

 private:
  using Call = void (*)(const void* task, int thread, int threads);

  void run_erased(Call call, const void* task);
  void close();
  void work(int thread);
  uint64_t next_round(uint64_t seen);

  std::vector<std::thread> workers_;
  // A line each, so that who spins on one is not held up by who writes another.
  alignas(64) std::atomic<uint64_t> round_{0};
  alignas(64) std::atomic<int> left_{0};
  alignas(64) std::atomic<int> asleep_{0};
  alignas(64) Call call_ = nullptr;
  const void* task_ = nullptr;
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The part of `count` that falls to a thread: as even as it goes, in order.
inline int64_t share(int64_t count, int thread, int threads) { return count * thread / threads; }

}  // namespace halfweave
