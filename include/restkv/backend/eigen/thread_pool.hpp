// SPDX-License-Identifier: Apache-2.0
/// @file
/// `thread_pool`: parallel loops over Eigen's thread pool, with a slot number for per-thread memory.
#pragma once

#include <restkv/core/config.hpp>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <atomic>
#include <memory>

namespace restkv::eigen {

/// A fixed number of threads, the calling one included. Loops do not allocate: what travels to the workers is two
/// pointers.
class thread_pool {
 public:
  explicit thread_pool(int threads) : workers_(threads > 1 ? threads - 1 : 0) {
    if (workers_ > 0) pool_ = std::make_unique<Eigen::ThreadPool>(workers_);
  }

  [[nodiscard]] int threads() const noexcept { return workers_ + 1; }

  /// Runs body(i, slot) for i in [0, n), each once; slot is in [0, threads()) and unique among those running at a time.
  /// Threads take the next index as they become free, so unequal pieces balance.
  template <class Body>
  void run(index_t n, const Body& body) const {
    const auto helpers = static_cast<int>(std::min<index_t>(workers_, n - 1));
    if (helpers <= 0) {
      for (index_t i = 0; i < n; ++i) body(i, 0);
      return;
    }
    loop<Body> shared{&body, n, static_cast<unsigned>(helpers)};
    for (int w = 0; w < helpers; ++w) pool_->Schedule([&shared] { shared.work(true); });
    shared.work(false);
    shared.done.Wait();
  }

 private:
  template <class Body>
  struct loop {
    loop(const Body* work_body, index_t count, unsigned helpers) : body(work_body), n(count), done(helpers) {}

    void work(bool helper) {
      const int slot = next_slot.fetch_add(1);
      for (index_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) (*body)(i, slot);
      if (helper) done.Notify();
    }

    const Body* body;
    index_t n;
    std::atomic<index_t> next{0};
    std::atomic<int> next_slot{0};
    Eigen::Barrier done;
  };

  int workers_;
  std::unique_ptr<Eigen::ThreadPool> pool_;
};

}  // namespace restkv::eigen
