// SPDX-License-Identifier: Apache-2.0
/// @file
/// `session`: a running sequence whose cache is evicted while it grows.
#pragma once

#include <restkv/compact.hpp>
#include <restkv/select.hpp>
#include <restkv/session/session_memory.hpp>
#include <restkv/session/session_observation.hpp>

#include <utility>

namespace restkv {

/// The cache of one sequence in memory of the caller's, all layers of it: tokens are appended, evictions keep it under
/// its mark. Opened over a block of `session_plan::memory_bytes`; nothing is allocated afterwards.
///
/// What a call does is defined token by token: before each token comes an eviction if one is due, then the token is
/// stored, then its query is asked for running scores. A prompt in one piece, in chunks and token by token therefore
/// leaves the same bits. Layers do not depend on each other.
///
/// The engine computes attention over `cache(layer)`, which holds the appended tokens until the next call: the eviction
/// comes before the token after them. What the cache holds is exact; positions say where in the sequence it came from.
///
/// One thread uses a session, and its backend, at a time.
///
/// Errors name both numbers, and the call that fails changes nothing. The exception are faults of the policy's own
/// parts (a budget allocator that breaks its promises), which end a call between two tokens. Throws what the backend
/// throws.
template <tensor_backend Backend, class SessionPolicy, element T>
class session {
  using running_type = typename SessionPolicy::running_type;
  using layer_type = detail::session_layer<T>;
  static constexpr bool running = detail::runs<running_type>;

 public:
  /// Not open: only `open` may be called.
  session() = default;
  session(const session&) = delete;  // two would write one memory: see `fork_to`
  session& operator=(const session&) = delete;
  /// Leaves `other` not open.
  session(session&& other) noexcept { *this = std::move(other); }
  /// Leaves `other` not open.
  session& operator=(session&& other) noexcept {
    backend_ = std::exchange(other.backend_, nullptr);
    plan_ = other.plan_;
    memory_ = other.memory_;
    block_ = std::exchange(other.block_, {});
    speculating_ = std::exchange(other.speculating_, false);
    return *this;
  }
  ~session() = default;

  /// An empty sequence in `memory`, which must outlive the session, as the backend must. Fails, without touching
  /// either, where the memory is too small or the plan was made for elements of another size.
  [[nodiscard]] status open(Backend& backend, const session_plan<SessionPolicy>& plan, std::span<std::byte> memory) {
    if (plan.element_bytes != sizeof(T)) {
      return status::error(errc::shape_mismatch, "the plan is for elements of %zu bytes, the session's have %zu",
                           plan.element_bytes, sizeof(T));
    }
    if (memory.size() < plan.memory_bytes || memory.data() == nullptr) {
      return status::error(errc::workspace_too_small, "the session's memory has %zu bytes, the plan needs %zu",
                           memory.data() == nullptr ? std::size_t{0} : memory.size(), plan.memory_bytes);
    }
    workspace space(memory);
    memory_ = {plan, space};
    backend_ = &backend;
    plan_ = plan;
    block_ = memory;
    speculating_ = false;
    return {};
  }

  /// Forgets the sequence; the memory and what `set_projection` said stay.
  void clear() noexcept {
    speculating_ = false;
    for (index_t l = 0; l < layers(); ++l) memory_.layers[l].clear();
  }

  /// W_O of a layer [hidden, query_heads * head_dim] and the metric from it, for scores and rescorers that measure
  /// through W_O. Views: they must outlive the session.
  [[nodiscard]] status set_projection(index_t layer, const tensor_view<const T, 2>& projection,
                                      const output_metric_view& metric) noexcept {
    RESTKV_RETURN_IF_FAILED(check_layer_index(layer));
    memory_.layers[layer].projection = projection;
    memory_.layers[layer].metric = metric;
    return {};
  }

  /// Appends n tokens with their queries, after RoPE; n may be more than there is room for.
  ///
  /// query: [query_heads, n, head_dim], not read (and may be empty) where the policy asks no queries; key and value:
  /// [kv_heads, n, head_dim]. Any strides, none of it in the session's own memory.
  ///
  /// Cost: the copy; with a running score one query's scores for each token; and the evictions.
  [[nodiscard]] status append(index_t layer, const tensor_view<const T, 3>& query, const tensor_view<const T, 3>& key,
                              const tensor_view<const T, 3>& value) {
    RESTKV_RETURN_IF_FAILED(check_input(layer, key, value));
    if (plan_.policy.attention_rows) {
      return status::error(errc::invalid_argument, "the plan has attention_rows: use append_attention");
    }
    if constexpr (needs_window<detail::session_score<SessionPolicy>>()) {
      RESTKV_RETURN_IF_FAILED(check_tensor("query", query, plan_.shape.query_heads, key.extent(1)));
    }
    layer_type& s = memory_.layers[layer];
    for (index_t i = 0; i < key.extent(1); ++i) {
      if (!speculating_) RESTKV_RETURN_IF_FAILED(make_room(layer));
      if (plan_.query_rows > 0) s.store_query(query, i);
      s.store(key, value, i);
      if (speculating_) ++s.speculated;
      if (speculating_) continue;
      RESTKV_RETURN_IF_FAILED(detail::count_token(*backend_, plan_, memory_, layer, query.slice(1, i, 1)));
    }
    return {};
  }

  /// Appends n tokens with the attention that their queries paid, for a running score, in an engine whose kernel
  /// computes it: attention[h][i][j], the share of slot j of query head h, over the cache as it is, whose slots lie
  /// before the new tokens. [query_heads, n, at least the longest head + n]; row i is read up to its own token. At most
  /// `room(layer)` tokens at a time, as an eviction between them would move the slots.
  template <element A>
  [[nodiscard]] status append_attention(index_t layer, const tensor_view<const A, 3>& attention,
                                        const tensor_view<const T, 3>& key, const tensor_view<const T, 3>& value) {
    RESTKV_RETURN_IF_FAILED(check_input(layer, key, value));
    if (!plan_.policy.attention_rows) {
      return status::error(errc::invalid_argument, "append_attention needs a plan with attention_rows");
    }
    layer_type& s = memory_.layers[layer];
    const index_t n = key.extent(1);
    if (!speculating_ && n > room(layer)) {
      return status::error(errc::invalid_argument,
                           "attention is over the cache as it is: %lld tokens come, %lld fit before the next eviction "
                           "(see evict_if_due)",
                           static_cast<long long>(n), static_cast<long long>(room(layer)));
    }
    const index_t entries = s.longest() + n;
    if (attention.extent(0) != plan_.shape.query_heads || attention.extent(1) != n || attention.extent(2) < entries ||
        (attention.data == nullptr && n > 0)) {
      return status::error(errc::shape_mismatch, "attention is [%lld, %lld, %lld], [%lld, %lld, %lld] is needed",
                           static_cast<long long>(attention.extent(0)), static_cast<long long>(attention.extent(1)),
                           static_cast<long long>(attention.data == nullptr ? 0 : attention.extent(2)),
                           static_cast<long long>(plan_.shape.query_heads), static_cast<long long>(n),
                           static_cast<long long>(entries));
    }
    RESTKV_RETURN_IF_FAILED(detail::check_view("attention", attention));
    for (index_t i = 0; i < n; ++i) {
      s.store(key, value, i);
      if (speculating_) ++s.speculated;
      const auto row = [&](index_t h, index_t slot) { return widen<double>(attention(h, i, slot)); };
      if (speculating_) {
        const index_t at = s.speculated - 1;
        for (index_t h = 0; h < plan_.shape.query_heads; ++h) {
          const index_t count = s.lengths(0, h / plan_.shape.group());
          for (index_t slot = 0; slot < count; ++slot) s.attention(at, h, slot) = row(h, slot);
        }
      } else {
        detail::count_token_with(plan_, s, layer, row);
      }
    }
    return {};
  }

  /// Tokens that can be appended to a layer before an eviction comes; 0 when one is due.
  [[nodiscard]] index_t room(index_t layer) const noexcept {
    const layer_type& s = memory_.layers[layer];
    const index_t heads = plan_.shape.kv_heads;
    index_t total = 0;
    for (index_t h = 0; h < heads; ++h) total += s.lengths(0, h);
    const index_t below_mark = (heads * plan_.policy.high_water - total) / heads;
    const index_t entries = plan_.shape.tokens - plan_.policy.speculation - s.longest();
    index_t tokens = std::min(below_mark, entries);
    if (plan_.policy.evict_every > 0) tokens = std::min(tokens, plan_.policy.evict_every - s.since_eviction);
    return std::max<index_t>(0, tokens);
  }

  /// Does what the next append would do first, and no more: evicts a layer if that is due.
  [[nodiscard]] status evict_if_due(index_t layer) {
    RESTKV_RETURN_IF_FAILED(check_layer_index(layer));
    if (speculating_ || room(layer) > 0) return {};
    return evict(layer);
  }

  /// Evicts a layer now, down to the policy's budget.
  [[nodiscard]] status evict(index_t layer) {
    RESTKV_RETURN_IF_FAILED(check_layer_index(layer));
    if (speculating_) return status::error(errc::invalid_argument, "nothing is evicted during speculation");
    layer_type& s = memory_.layers[layer];
    detail::running_rows<running_type> rows{};
    if constexpr (running) rows = {s.running, s.observers, plan_.policy.running};
    const auto policy = make_policy(rows);
    plan<std::remove_cv_t<decltype(policy)>> made;
    problem_shape shape = plan_.shape;
    shape.layer = layer;
    RESTKV_RETURN_IF_FAILED(make_plan(*backend_, policy, shape, made));
    kept_tokens kept;
    RESTKV_RETURN_IF_FAILED(
        select(*backend_, made, cache(layer), workspace(memory_.selection, plan_.selection_bytes), kept));
    index_t dropped = 0;
    for (index_t h = 0; h < shape.kv_heads; ++h) dropped += s.lengths(0, h) - kept.lengths(0, h);
    if (dropped > 0) {
      RESTKV_RETURN_IF_FAILED(
          compact_in_place(kept, detail::with_batch(s.key), detail::with_batch(s.value),
                                               backend_loop<Backend>{*backend_}));
      s.keep(kept);
      ++s.evictions;
    }
    s.since_eviction = 0;
    return {};
  }

  /// Holds evictions and running scores: tokens appended from now on can be taken back. Fails during speculation and
  /// where the plan leaves no room for it.
  [[nodiscard]] status begin_speculation() noexcept {
    RESTKV_RETURN_IF_FAILED(check_open());
    if (speculating_) return status::error(errc::invalid_argument, "speculation has begun already");
    if (plan_.policy.speculation == 0) {
      return status::error(errc::invalid_argument, "the plan has speculation 0: no token can be taken back");
    }
    speculating_ = true;
    return {};
  }

  /// Ends the speculation with the first `accepted` of its tokens, in all layers, as if only they had been appended:
  /// running scores and evictions catch up. With attention rows evictions come after them, not between. Fails where a
  /// layer has fewer.
  [[nodiscard]] status commit(index_t accepted) {
    RESTKV_RETURN_IF_FAILED(check_open());
    if (!speculating_) return status::error(errc::invalid_argument, "commit without begin_speculation");
    for (index_t l = 0; l < layers(); ++l) {
      if (accepted >= 0 && accepted <= memory_.layers[l].speculated) continue;
      return status::error(errc::invalid_argument, "%lld tokens are accepted, layer %lld has %lld",
                           static_cast<long long>(accepted), static_cast<long long>(l),
                           static_cast<long long>(memory_.layers[l].speculated));
    }
    speculating_ = false;
    for (index_t l = 0; l < layers(); ++l) {
      memory_.layers[l].take_back();
      RESTKV_RETURN_IF_FAILED(accept(l, accepted));
    }
    return {};
  }

  /// Ends the speculation without any of its tokens: everything is, bit for bit, as before `begin_speculation`.
  [[nodiscard]] status rollback() noexcept {
    RESTKV_RETURN_IF_FAILED(check_open());
    if (!speculating_) return status::error(errc::invalid_argument, "rollback without begin_speculation");
    speculating_ = false;
    for (index_t l = 0; l < layers(); ++l) memory_.layers[l].take_back();
    return {};
  }

  /// The cache of a layer, speculated tokens included, as a view for attention kernels, `output_error` and the like:
  /// keys and values [1, kv_heads, longest head, head_dim] with the length of each head, and the kept queries. Valid
  /// until the next call that appends or evicts.
  [[nodiscard]] layer_view<T> cache(index_t layer) const noexcept {
    return memory_.layers[layer].view(plan_.window);
  }

  ///@{
  /// Of the plan, of a layer, or of a head's cache. Speculated tokens count in the length of a head, not among those
  /// seen.
  [[nodiscard]] const session_plan<SessionPolicy>& plan_of() const noexcept { return plan_; }
  [[nodiscard]] index_t layers() const noexcept { return backend_ == nullptr ? 0 : plan_.shape.layers; }
  [[nodiscard]] bool speculating() const noexcept { return speculating_; }
  [[nodiscard]] index_t length(index_t layer, index_t kv_head) const noexcept {
    return memory_.layers[layer].lengths(0, kv_head);
  }
  [[nodiscard]] index_t tokens_seen(index_t layer) const noexcept { return memory_.layers[layer].seen; }
  [[nodiscard]] index_t evictions(index_t layer) const noexcept { return memory_.layers[layer].evictions; }
  [[nodiscard]] index_t speculated(index_t layer) const noexcept { return memory_.layers[layer].speculated; }
  ///@}

  /// Where in the sequence the tokens in a head's slots came from, ascending; valid until the next call that appends or
  /// evicts.
  [[nodiscard]] std::span<const position_t> positions(index_t layer, index_t kv_head) const noexcept {
    const layer_type& s = memory_.layers[layer];
    return {s.positions[kv_head].data, static_cast<std::size_t>(s.lengths(0, kv_head))};
  }

  /// What a running score says of a slot's token, for inspection; 0 where no query has seen it.
  [[nodiscard]] double running_score_of(index_t layer, index_t query_head, index_t slot) const noexcept
    requires(running)
  {
    const layer_type& s = memory_.layers[layer];
    const index_t seen_by = s.observers(query_head / plan_.shape.group(), slot);
    return plan_.policy.running.score(seen_by == 0 ? 0.0 : s.running(query_head, slot), seen_by);
  }

  /// Copies the sequence to another session of the same plan, over whatever that held: the branches of a beam. What
  /// `set_projection` said is not copied. Fails during speculation of either, and where the plans differ in their
  /// sizes. Cost: a copy of what is kept.
  [[nodiscard]] status fork_to(session& other) const noexcept {
    RESTKV_RETURN_IF_FAILED(check_open());
    RESTKV_RETURN_IF_FAILED(other.check_open());
    if (speculating_ || other.speculating_) {
      return status::error(errc::invalid_argument, "a session is not copied during speculation");
    }
    if (&other == this) return {};
    const problem_shape& a = plan_.shape;
    const problem_shape& b = other.plan_.shape;
    if (a.layers != b.layers || a.query_heads != b.query_heads || a.kv_heads != b.kv_heads ||
        a.head_dim != b.head_dim || a.tokens != b.tokens || plan_.window != other.plan_.window ||
        plan_.query_rows != other.plan_.query_rows) {
      return status::error(errc::shape_mismatch,
                           "sessions of different plans: %lld and %lld layers, %lld and %lld KV heads, %lld and %lld "
                           "tokens a head, windows of %lld and %lld queries",
                           static_cast<long long>(a.layers), static_cast<long long>(b.layers),
                           static_cast<long long>(a.kv_heads), static_cast<long long>(b.kv_heads),
                           static_cast<long long>(a.tokens), static_cast<long long>(b.tokens),
                           static_cast<long long>(plan_.window), static_cast<long long>(other.plan_.window));
    }
    for (index_t l = 0; l < layers(); ++l) {
      detail::copy_layer(plan_.window, memory_.layers[l], other.memory_.layers[l]);
    }
    return {};
  }

 private:
  template <tensor_backend B, class P, element E>
  friend class session_archive;

  [[nodiscard]] status check_open() const noexcept {
    if (backend_ == nullptr) return status::error(errc::invalid_argument, "the session is not open");
    return {};
  }

  [[nodiscard]] status check_layer_index(index_t layer) const noexcept {
    RESTKV_RETURN_IF_FAILED(check_open());
    if (layer >= 0 && layer < layers()) return {};
    return status::error(errc::invalid_argument, "layer %lld of %lld layers does not exist",
                         static_cast<long long>(layer), static_cast<long long>(layers()));
  }

  [[nodiscard]] status check_tensor(const char* name, const tensor_view<const T, 3>& tensor, index_t heads,
                                    index_t tokens) const noexcept {
    return detail::check_session_tensor(name, tensor, {heads, tokens, plan_.shape.head_dim}, block_);
  }

  [[nodiscard]] status check_input(index_t layer, const tensor_view<const T, 3>& key,
                                   const tensor_view<const T, 3>& value) const noexcept {
    RESTKV_RETURN_IF_FAILED(check_layer_index(layer));
    const index_t n = key.extent(1);
    if (n < 0) return status::error(errc::invalid_argument, "key has %lld tokens", static_cast<long long>(n));
    RESTKV_RETURN_IF_FAILED(check_tensor("key", key, plan_.shape.kv_heads, n));
    RESTKV_RETURN_IF_FAILED(check_tensor("value", value, plan_.shape.kv_heads, n));
    const layer_type& s = memory_.layers[layer];
    constexpr index_t longest = std::numeric_limits<position_t>::max();
    if (n > longest - s.seen - s.speculated) {
      return status::error(errc::invalid_argument, "%lld tokens behind %lld pass the longest sequence, %lld",
                           static_cast<long long>(n), static_cast<long long>(s.seen + s.speculated),
                           static_cast<long long>(longest));
    }
    if (speculating_ && n > plan_.policy.speculation - s.speculated) {
      return status::error(errc::invalid_argument,
                           "%lld tokens behind %lld pass the plan's speculation, %lld", static_cast<long long>(n),
                           static_cast<long long>(s.speculated), static_cast<long long>(plan_.policy.speculation));
    }
    const auto& policy = plan_.policy.policy;
    return check_layer(cache(layer), plan_.shape, 0, false, false,
                       needs_metric(policy.score) || needs_metric(weight_of(policy.rescoring)));
  }

  [[nodiscard]] auto make_policy(const detail::running_rows<running_type>& rows) const noexcept {
    return detail::make_selecting_policy(plan_.policy, rows);
  }

  /// Evicts where the next token would not fit or is due.
  [[nodiscard]] status make_room(index_t layer) {
    if (room(layer) > 0) return {};
    RESTKV_RETURN_IF_FAILED(evict(layer));
    if (room(layer) > 0) return {};
    return status::error(errc::invalid_argument,
                         "layer %lld has %lld tokens in its longest head after an eviction: no room",
                         static_cast<long long>(layer), static_cast<long long>(memory_.layers[layer].longest()));
  }

  /// Appends the first tokens that were just taken back. They still lie behind their heads, where no eviction on the
  /// way reaches.
  [[nodiscard]] status accept(index_t layer, index_t accepted) {
    layer_type& s = memory_.layers[layer];
    const index_t heads = plan_.shape.kv_heads;
    std::copy_n(s.lengths.data, heads, memory_.first_slots);
    for (index_t i = 0; i < accepted; ++i) {
      if (plan_.policy.attention_rows) {
        for (index_t h = 0; h < heads; ++h) s.move_behind(h, memory_.first_slots[h] + i);
        detail::count_token_with(plan_, s, layer,
                                 [&](index_t h, index_t slot) { return s.attention(i, h, slot); });
        continue;
      }
      RESTKV_RETURN_IF_FAILED(make_room(layer));
      for (index_t h = 0; h < heads; ++h) s.move_behind(h, memory_.first_slots[h] + i);
      const index_t row = plan_.query_rows == 0 ? 0 : s.query_row(s.seen);
      const tensor_view<const T, 3> query = s.queries.slice(1, row, 1);
      RESTKV_RETURN_IF_FAILED(detail::count_token(*backend_, plan_, memory_, layer, query));
    }
    // Behind rows of attention an eviction that was held comes now, so that the next speculation finds its room.
    if (plan_.policy.attention_rows && accepted > 0 && room(layer) == 0) return evict(layer);
    return {};
  }

  Backend* backend_ = nullptr;
  session_plan<SessionPolicy> plan_{};
  detail::session_memory<Backend, SessionPolicy, T> memory_{};
  std::span<std::byte> block_{};
  bool speculating_ = false;
};

#if RESTKV_EXCEPTIONS

/// An open session; throws `restkv::error`. See `session::open`.
template <element T, tensor_backend Backend, class SessionPolicy>
[[nodiscard]] session<Backend, SessionPolicy, T> open_session(Backend& backend, const session_plan<SessionPolicy>& plan,
                                                              std::span<std::byte> memory) {
  session<Backend, SessionPolicy, T> opened;
  throw_if_failed(opened.open(backend, plan, memory));
  return opened;
}

#endif

}  // namespace restkv
