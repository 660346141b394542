// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"
#include "exclusive_use.hpp"
#include "functions.hpp"
#include "layer.hpp"
#include "policy.hpp"

#include "policy_parts.hpp"

#include <restkv/score/observed_attention.hpp>
#include <restkv/session/session.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

namespace restkv::python {

namespace {

/// A session whose policy was chosen at run time.
class any_session {
 public:
  virtual ~any_session() = default;
  virtual status append(index_t layer, const tensor_view<const float, 3>& query, const tensor_view<const float, 3>& key,
                        const tensor_view<const float, 3>& value) = 0;
  virtual status set_projection(index_t layer, const tensor_view<const float, 2>& projection,
                                const output_metric_view& metric) = 0;
  virtual status evict(index_t layer) = 0;
  virtual status evict_if_due(index_t layer) = 0;
  virtual status begin_speculation() = 0;
  virtual status commit(index_t accepted) = 0;
  virtual status rollback() = 0;
  virtual void clear() = 0;
  virtual std::unique_ptr<any_session> fork() = 0;
  [[nodiscard]] virtual index_t room(index_t layer) const = 0;
  [[nodiscard]] virtual layer_view<float> cache(index_t layer) const = 0;
  [[nodiscard]] virtual std::span<const position_t> positions(index_t layer, index_t kv_head) const = 0;
  [[nodiscard]] virtual index_t tokens_seen(index_t layer) const = 0;
  [[nodiscard]] virtual index_t evictions(index_t layer) const = 0;
  [[nodiscard]] virtual bool speculating() const = 0;
  [[nodiscard]] virtual std::size_t bytes() const = 0;
};

template <class SessionPolicy>
class session_of final : public any_session {
  using session_type = session<eigen_backend, SessionPolicy, float>;

 public:
  session_of(int threads, const session_plan<SessionPolicy>& plan)
      : backend_(threads), memory_(plan.memory_bytes) {
    require(session_.open(backend_, plan, memory_));
  }

  status append(index_t layer, const tensor_view<const float, 3>& query, const tensor_view<const float, 3>& key,
                const tensor_view<const float, 3>& value) override {
    return session_.append(layer, query, key, value);
  }
  status set_projection(index_t layer, const tensor_view<const float, 2>& projection,
                        const output_metric_view& metric) override {
    return session_.set_projection(layer, projection, metric);
  }
  status evict(index_t layer) override { return session_.evict(layer); }
  status evict_if_due(index_t layer) override { return session_.evict_if_due(layer); }
  status begin_speculation() override { return session_.begin_speculation(); }
  status commit(index_t accepted) override { return session_.commit(accepted); }
  status rollback() override { return session_.rollback(); }
  void clear() override { session_.clear(); }
  std::unique_ptr<any_session> fork() override {
    auto made = std::make_unique<session_of>(backend_.threads(), session_.plan_of());
    require(session_.fork_to(made->session_));
    return made;
  }
  [[nodiscard]] index_t room(index_t layer) const override { return session_.room(layer); }
  [[nodiscard]] layer_view<float> cache(index_t layer) const override { return session_.cache(layer); }
  [[nodiscard]] std::span<const position_t> positions(index_t layer, index_t kv_head) const override {
    return session_.positions(layer, kv_head);
  }
  [[nodiscard]] index_t tokens_seen(index_t layer) const override { return session_.tokens_seen(layer); }
  [[nodiscard]] index_t evictions(index_t layer) const override { return session_.evictions(layer); }
  [[nodiscard]] bool speculating() const override { return session_.speculating(); }
  [[nodiscard]] std::size_t bytes() const override { return memory_.size(); }

 private:
  eigen_backend backend_;
  std::vector<std::byte> memory_;
  session_type session_;
};

/// What a session is made of, beyond its policy.
struct session_options {
  problem_shape shape;
  index_t high_water = 0;
  index_t evict_every = 0;
  index_t refresh = 1;
  index_t speculation = 0;
  int threads = 1;
};

template <class Running, class Policy>
std::unique_ptr<any_session> make(const Policy& policy, const Running& running, const session_options& options) {
  const session_policy<Policy, Running> made{.policy = policy,
                                             .running = running,
                                             .high_water = options.high_water,
                                             .evict_every = options.evict_every,
                                             .refresh = options.refresh,
                                             .speculation = options.speculation};
  session_plan<session_policy<Policy, Running>> plan;
  const eigen_backend backend(options.threads);
  require(make_session_plan<float>(backend, made, options.shape, plan));
  return std::make_unique<session_of<session_policy<Policy, Running>>>(options.threads, plan);
}

any_running running_of(const cli::configuration& c) {
  switch (c.temporal) {
    case cli::temporal_kind::sum: return {running_sum{}};
    case cli::temporal_kind::ema: return {running_ema{.decay = 1.0f - c.alpha}};
    case cli::temporal_kind::last: return {running_last{}};
    case cli::temporal_kind::max: return {running_maximum{}};
    default: return {running_mean{}};
  }
}

/// With running scores: the newest tokens, which no query has judged yet, are protected.
template <class Score>
std::unique_ptr<any_session> make_running(cli::configuration c, const Score& score, const session_options& options) {
  c.recent = std::max({c.recent, c.window, options.refresh});
  c.spatial = c.spatial == cli::spatial_kind::adaptive ? cli::spatial_kind::none : c.spatial;
  return make(cli::policy_with(c, score, c.observes_every_query() ? every_query : c.window), running_of(c), options);
}

std::unique_ptr<any_session> make_session(const cli::configuration& c, bool running, const session_options& options) {
  const auto unsupported = [&](const char* why) {
    return failure(errc::unsupported, fmt::format("the method {} with the rescoring {} {}", cli::name_of(c.method),
                                                  cli::name_of(c.rescoring), why));
  };
  using method = cli::method_kind;
  if (c.over_layers()) {
    throw failure(errc::unsupported,
                  fmt::format("the allocation {} is over the layers of a model: a session evicts each layer by itself",
                              cli::name_of(c.allocation)));
  }
  if (c.rescoring != cli::rescoring_kind::none) throw unsupported("is not among those that sessions run");
  if (running && c.spatial == cli::spatial_kind::adaptive) {
    throw failure(errc::invalid_argument, "an adaptive window compares queries: it does not go with running scores");
  }
  switch (c.method) {
    case method::restkv:
    case method::caote:
      if (running) return make_running(c, cli::rest_kv_of(c), options);
      return make(cli::policy_with(c, cli::rest_kv_of(c), c.window), no_running{}, options);
    case method::snapkv:
    case method::adakv:
      if (running) return make_running(c, observed_attention{}, options);
      return make(cli::policy_with(c, snap_kv{}, c.window), no_running{}, options);
    case method::h2o:
    case method::tova: return make_running(c, observed_attention{}, options);
    case method::knorm:
    case method::keydiff:
    case method::lagkv:
    case method::curdkv:
    case method::leverage:
    case method::keyredundancy:
    case method::valuerange: {
      if (running) throw unsupported("asks no queries: it has no running score");
      cli::cache_score memory;  // of scores that look at queries
      return make(cli::policy_with(c, cli::head_score_of(c, {}, memory, ""), c.window), no_running{}, options);
    }
    case method::streamingllm:
    case method::random:
      if (running) throw unsupported("asks no queries: it has no running score");
      return make(cli::policy_with(c, cli::position_score_of(c), c.window), no_running{}, options);
    default: throw unsupported("is not among those that sessions run");
  }
}

constexpr array_rules chunk_rules{.rank = 3, .axes = "[heads, tokens, head_dim]"};
constexpr array_rules chunk_of_batch_rules{.rank = 4, .axes = "[1, heads, tokens, head_dim]"};

/// [heads, tokens, head_dim], or the same with a batch of 1 in front.
array take_chunk(nb::handle object, const char* name) {
  const bool batched = nb::hasattr(object, "ndim") && nb::cast<int>(object.attr("ndim")) == 4;
  array made = take_array(object, name, batched ? chunk_of_batch_rules : chunk_rules);
  if (!batched) return made;
  if (made.extents[0] != 1) {
    throw failure(errc::shape_mismatch, fmt::format("{} has {} sequences, a session holds 1", name, made.extents[0]));
  }
  made.extents.erase(made.extents.begin());
  made.strides.erase(made.strides.begin());
  return made;
}

/// `restkv.Session`.
class session_value {
 public:
  session_value(const policy& policy, index_t layers, index_t query_heads, index_t kv_heads, index_t head_dim,
                std::optional<index_t> high_water, index_t evict_every, std::optional<bool> running, index_t refresh,
                index_t speculation, std::optional<int> threads)
      : policy_(policy),
        options_{.shape = {.query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim, .layers = layers},
                 .high_water = high_water.value_or(policy.c.budget + std::max<index_t>(policy.c.budget / 4, 1)),
                 .evict_every = evict_every,
                 .refresh = refresh,
                 .speculation = speculation,
                 .threads = threads.value_or(default_threads())} {
    if (options_.threads < 1 || options_.threads > 1024) {
      throw failure(errc::invalid_argument, fmt::format("threads is {}, must be within [1, 1024]", options_.threads));
    }
    if (layers < 1) throw failure(errc::invalid_argument, fmt::format("layers is {}, must be at least 1", layers));
    session_ = make_session(policy.c, running.value_or(policy.c.observes_every_query()), options_);
    projections_.resize(static_cast<std::size_t>(layers));
  }

  void set_projection(index_t layer, nb::object metric) {
    const auto& given = nb::cast<const metric_value&>(metric);
    check_layer_index(layer);
    const exclusive_use use(used_, "session");
    const nb::gil_scoped_release unlocked;
    projection made;
    const borrowed_backend backend(options_.threads);
    made.w_o.read(*backend, given.w_o);
    require(session_->set_projection(layer, made.w_o.view(), given.metric.view()));
    const nb::gil_scoped_acquire locked;
    made.metric = std::move(metric);
    projections_[static_cast<std::size_t>(layer)] = std::move(made);
  }

  void append(index_t layer, nb::handle query, nb::handle key, nb::handle value) {
    const array keys = take_chunk(key, "key");
    const array values = take_chunk(value, "value");
    const array queries = query.is_none() ? array{} : take_chunk(query, "query");
    if (queries.missing() && policy_.c.reads_queries()) {
      throw failure(errc::missing_input, "the policy looks at queries: query is None");
    }
    const exclusive_use use(used_, "session");
    from_ = keys.from;
    const nb::gil_scoped_release unlocked;
    const borrowed_backend backend(options_.threads);
    float_tensor<3> query_rows;
    float_tensor<3> key_rows;
    float_tensor<3> value_rows;
    key_rows.read(*backend, keys);
    value_rows.read(*backend, values);
    if (!queries.missing()) query_rows.read(*backend, queries);
    require(session_->append(layer, query_rows.view(), key_rows.view(), value_rows.view()));
  }

  void evict(index_t layer) {
    const exclusive_use use(used_, "session");
    require(session_->evict(layer));
  }
  void evict_if_due(index_t layer) {
    const exclusive_use use(used_, "session");
    require(session_->evict_if_due(layer));
  }
  void begin_speculation() {
    const exclusive_use use(used_, "session");
    require(session_->begin_speculation());
  }
  void commit(index_t accepted) {
    const exclusive_use use(used_, "session");
    require(session_->commit(accepted));
  }
  void rollback() {
    const exclusive_use use(used_, "session");
    require(session_->rollback());
  }
  void clear() {
    const exclusive_use use(used_, "session");
    session_->clear();
  }

  /// A session of its own with the same content and the same projections.
  [[nodiscard]] std::unique_ptr<session_value> fork() {
    auto made = std::unique_ptr<session_value>(new session_value(policy_, options_));
    const exclusive_use use(used_, "session");
    {
      const nb::gil_scoped_release unlocked;
      made->session_ = session_->fork();
    }
    made->from_ = from_;
    made->projections_.resize(projections_.size());
    for (std::size_t layer = 0; layer < projections_.size(); ++layer) {
      if (projections_[layer].metric.is_valid()) {
        made->set_projection(static_cast<index_t>(layer), projections_[layer].metric);
      }
    }
    return made;
  }

  [[nodiscard]] nb::tuple cache(nb::handle self, index_t layer) const {
    check_layer_index(layer);
    const layer_view<float> view = session_->cache(layer);
    const auto give = [&](const tensor_view<const float, 4>& part) {
      const std::vector<std::size_t> shape(part.extents.begin() + 1, part.extents.end());
      const std::vector<std::int64_t> strides(part.strides.begin() + 1, part.strides.end());
      return give_array(from_, part.data, shape, nb::dtype<float>(), self, &strides);
    };
    return nb::make_tuple(give(view.key.chunk(0)), give(view.value.chunk(0)));
  }

  [[nodiscard]] nb::object lengths(nb::handle self, index_t layer) const {
    check_layer_index(layer);
    const layer_view<float> view = session_->cache(layer);
    return give_array(from_, view.head_lengths.data, {static_cast<std::size_t>(options_.shape.kv_heads)},
                      nb::dtype<std::int32_t>(), self);
  }

  [[nodiscard]] nb::object positions(nb::handle self, index_t layer, index_t kv_head) const {
    check_layer_index(layer);
    if (kv_head < 0 || kv_head >= options_.shape.kv_heads) {
      throw failure(errc::invalid_argument, fmt::format("head {} of {} heads does not exist", kv_head,
                                                        options_.shape.kv_heads));
    }
    const std::span<const position_t> kept = session_->positions(layer, kv_head);
    return give_array(from_, kept.data(), {kept.size()}, nb::dtype<position_t>(), self);
  }

  [[nodiscard]] index_t room(index_t layer) const { return at(layer).room(layer); }
  [[nodiscard]] index_t tokens_seen(index_t layer) const { return at(layer).tokens_seen(layer); }
  [[nodiscard]] index_t evictions(index_t layer) const { return at(layer).evictions(layer); }
  [[nodiscard]] bool speculating() const { return session_->speculating(); }
  [[nodiscard]] std::size_t bytes() const { return session_->bytes(); }
  [[nodiscard]] const policy& policy_of() const { return policy_; }
  [[nodiscard]] const session_options& options() const { return options_; }

 private:
  struct projection {
    nb::object metric;  ///< whose views the session holds
    float_tensor<2> w_o;
  };

  session_value(policy policy, session_options options) : policy_(std::move(policy)), options_(options) {}

  void check_layer_index(index_t layer) const {
    if (layer >= 0 && layer < options_.shape.layers) return;
    throw failure(errc::invalid_argument, fmt::format("layer {} of {} layers does not exist", layer,
                                                      options_.shape.layers));
  }
  [[nodiscard]] const any_session& at(index_t layer) const {
    check_layer_index(layer);
    return *session_;
  }

  policy policy_;
  session_options options_;
  std::atomic<bool> used_ = false;
  framework from_ = framework::numpy;
  std::unique_ptr<any_session> session_;
  std::vector<projection> projections_;
};

}  // namespace

void add_session(nb::module_& m) {
  using value = session_value;
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<value>(m, "Session", R"(A running sequence whose cache is evicted while it grows: all layers of it.

Before each token comes an eviction if one is due, then the token is stored, then its query is asked; a prompt in
one piece, in chunks and token by token leaves the same. The cache holds float32. One thread uses a session at a
time.)")
      .def(nb::init<const policy&, index_t, index_t, index_t, index_t, std::optional<index_t>, index_t,
                    std::optional<bool>, index_t, index_t, std::optional<int>>(),
           nb::arg("policy"), nb::kw_only(), nb::arg("layers"), nb::arg("query_heads"), nb::arg("kv_heads"),
           nb::arg("head_dim"), nb::arg("high_water") = nb::none(), nb::arg("evict_every") = 0,
           nb::arg("running") = nb::none(), nb::arg("refresh") = 1, nb::arg("speculation") = 0,
           nb::arg("threads") = nb::none(),
           R"(high_water: most tokens per KV head, the mean over the heads of a layer; a quarter above the budget where it
is left out. evict_every: tokens between evictions, 0: only at the mark. running: whether the scores of all queries so far
are kept in one number a token, folded as the policy's temporal smoother says, instead of asking the window's
queries at each eviction; where it is left out, for policies that observe every query (h2o, tova). refresh: every
how many tokens running scores are asked for. speculation: most tokens that can be taken back.

Memory is taken once, here (`bytes`). Raises Error for policies that sessions do not run: those with a rescoring,
and scores beyond restkv, caote, snapkv, adakv, h2o, tova, knorm, keydiff, lagkv, curdkv, leverage, keyredundancy,
valuerange, streamingllm and random.)")
      .def("set_metric", &value::set_projection, nb::arg("layer"), nb::arg("metric"),
           nb::sig("def set_metric(self, layer: int, metric: Metric) -> None"),
           "W_O of a layer, for policies with `needs_w_o`. Before the first token.")
      .def("append", &value::append, nb::arg("layer"), nb::arg("query").none(), nb::arg("key"), nb::arg("value"),
           nb::sig("def append(self, layer: int, query: Array | None, key: Array, value: Array) -> None"),
           R"(Appends n tokens with their queries, evicting on the way where that is due.

query: [query_heads, n, head_dim], None where the policy looks at none; key, value: [kv_heads, n, head_dim]; all
with or without a batch of 1 in front. The interpreter's lock is not held. Raises Error, with nothing changed, for
arrays that do not fit.)")
      .def("evict", &value::evict, nb::arg("layer"), unlocked(), "Evicts a layer now, down to the policy's budget.")
      .def("evict_if_due", &value::evict_if_due, nb::arg("layer"), unlocked(),
           "Does what the next append would do first.")
      .def("cache", [](nb::handle self, index_t layer) { return nb::cast<const value&>(self).cache(self, layer); },
           nb::arg("layer"), nb::sig("def cache(self, layer: int) -> tuple[Any, Any]"),
           "(key, value) of a layer, [kv_heads, longest head, head_dim], of which lengths(layer) are tokens. Views of "
           "the session's memory: valid until the next append or eviction.")
      .def("lengths", [](nb::handle self, index_t layer) { return nb::cast<const value&>(self).lengths(self, layer); },
           nb::arg("layer"), nb::sig("def lengths(self, layer: int) -> Any"),
           "Tokens of each head, a view likewise. [kv_heads], int32")
      .def("positions",
           [](nb::handle self, index_t layer, index_t kv_head) {
             return nb::cast<const value&>(self).positions(self, layer, kv_head);
           },
           nb::arg("layer"), nb::arg("kv_head"), nb::sig("def positions(self, layer: int, kv_head: int) -> Any"),
           "Where in the sequence a head's tokens came from, ascending, a view likewise. int32")
      .def("room", &value::room, nb::arg("layer"), "Tokens that can be appended before an eviction comes.")
      .def("tokens_seen", &value::tokens_seen, nb::arg("layer"), "Tokens appended so far.")
      .def("evictions", &value::evictions, nb::arg("layer"), "Evictions so far.")
      .def("begin_speculation", &value::begin_speculation,
           "Holds evictions: tokens appended from now on can be taken back.")
      .def("commit", &value::commit, nb::arg("accepted"), unlocked(),
           "Ends the speculation with the first `accepted` of its tokens.")
      .def("rollback", &value::rollback, "Ends the speculation without any of its tokens.")
      .def("clear", &value::clear, "Forgets the sequence; what set_metric said stays.")
      .def("fork", [](value& v) { return v.fork().release(); }, nb::rv_policy::take_ownership,
           nb::sig("def fork(self) -> Session"), "A session of its own with the same sequence.")
      .def_prop_ro("policy", [](const value& v) -> policy { return v.policy_of(); })
      .def_prop_ro("speculating", &value::speculating, "Whether tokens can be taken back.")
      .def_prop_ro("high_water", [](const value& v) { return v.options().high_water; })
      .def_prop_ro("bytes", &value::bytes, "Memory of the session, whatever it holds.")
      .def("__repr__", [](const value& v) {
        const session_options& options = v.options();
        return fmt::format("<restkv.Session: {} layers, {} KV heads, {} tokens a head at most>", options.shape.layers,
                           options.shape.kv_heads, options.high_water);
      });
}

}  // namespace restkv::python
