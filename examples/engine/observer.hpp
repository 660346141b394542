// SPDX-License-Identifier: Apache-2.0
/// @file
/// `observer`: what happens in the engine, for a report or a test.
#pragma once

#include "request.hpp"

#include <restkv/core/layer.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <span>

namespace engine {

/// Why a sequence left the batch.
enum class outcome {
  finished,
  cancelled,
  preempted,  ///< for want of pages; it will be back
  refused,    ///< the pool cannot hold it even alone
};

/// A request in the batch.
struct sequence {
  request asked;
  index_t slot = 0;             ///< its sequence of the cache
  std::vector<token> tokens{};  ///< all that went into its cache, kept or not
  index_t answered = 0;         ///< tokens of the answer among them
  index_t events = 0;           ///< of its life so far
};

/// Told of every change of the cache after it has been made. The references are valid during the call only.
class observer {
 public:
  virtual ~observer() = default;
  /// The tokens are in the cache of every layer: a prompt, or the next one of the answer.
  virtual void appended(const sequence&, std::span<const token>) {}
  /// A layer is about to keep only `kept` of what `view` shows.
  virtual void selected(const sequence&, index_t /*layer*/, const restkv::layer_view<float>& /*view*/,
                        const restkv::const_kept_tokens& /*kept*/) {}
  /// It does now.
  virtual void evicted(const sequence&, index_t /*layer*/, const restkv::const_kept_tokens& /*kept*/) {}
  /// The newest token's attention in a layer. output: [query_heads, head_dim]
  virtual void attended(const sequence&, index_t /*layer*/, std::span<const float> /*output*/) {}
  /// Its pages have been released.
  virtual void left(const sequence&, outcome) {}
  /// All sequences of the batch have had their turn.
  virtual void stepped(std::span<const sequence>) {}
};

}  // namespace engine
