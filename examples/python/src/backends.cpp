// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"

#include "errors.hpp"

#include <fmt/format.h>

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace restkv::python {

namespace {

constexpr int most_threads = 1024;
constexpr std::size_t most_idle = 4;

struct idle_backends {
  std::mutex mutex;
  pid_t process = getpid();
  std::vector<std::unique_ptr<eigen_backend>> all;

  /// In a process that was forked the threads of these are gone: waiting for them would never end.
  void forget_after_fork() {
    if (process == getpid()) return;
    for (auto& backend : all) [[maybe_unused]] eigen_backend* const lost = backend.release();
    all.clear();
    process = getpid();
  }
};

idle_backends& idle() {
  static auto* const kept = new idle_backends;  // never destroyed: its threads may outlive the interpreter
  return *kept;
}

}  // namespace

int default_threads() {
  if (const char* const text = std::getenv("OMP_NUM_THREADS"); text != nullptr) {
    const long count = std::strtol(text, nullptr, 10);
    if (count >= 1) return static_cast<int>(std::min<long>(count, most_threads));
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::clamp(CPU_COUNT(&set), 1, most_threads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, most_threads);
}

borrowed_backend::borrowed_backend(std::optional<int> threads) {
  const int count = threads ? *threads : default_threads();
  if (count < 1 || count > most_threads) {
    throw failure(errc::invalid_argument, fmt::format("threads is {}, must be within [1, {}]", count, most_threads));
  }
  {
    const std::lock_guard lock(idle().mutex);
    idle().forget_after_fork();
    auto& all = idle().all;
    const auto at = std::find_if(all.begin(), all.end(), [&](const auto& b) { return b->threads() == count; });
    if (at != all.end()) {
      backend_ = std::move(*at);
      all.erase(at);
    }
  }
  if (backend_ == nullptr) backend_ = std::make_unique<eigen_backend>(count);
}

borrowed_backend::~borrowed_backend() {
  std::unique_ptr<eigen_backend> surplus;  // its threads are joined outside the lock
  const std::lock_guard lock(idle().mutex);
  idle().forget_after_fork();
  idle().all.push_back(std::move(backend_));
  if (idle().all.size() > most_idle) {
    surplus = std::move(idle().all.front());
    idle().all.erase(idle().all.begin());
  }
}

}  // namespace restkv::python
