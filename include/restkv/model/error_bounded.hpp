// SPDX-License-Identifier: Apache-2.0
/// @file
/// `error_bounded_selection`: the smallest cache whose exact error stays within a bound.
#pragma once

#include <restkv/select.hpp>
#include <restkv/verify/future_error.hpp>
#include <restkv/verify/output_error.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace restkv {

/// What a bound holds for.
enum class error_scope {
  layer,  ///< each layer by itself
  model,  ///< the mean of the layers' errors; all layers' tokens compete for it
};

/// Which error of a layer is bounded; see `output_errors`.
enum class error_statistic {
  mean,   ///< mean_relative: the whole change relative to the whole output
  worst,  ///< worst_relative: that of the worst query
};

/// A bound on the relative error that a kept set causes the window's own queries, through W_O where the layer has it.
struct error_bounded {
  double bound = 0.05;                               ///< 0.05 is 5 per cent; 0 keeps whatever changes anything
  error_scope scope = error_scope::layer;            ///< see error_scope
  error_statistic statistic = error_statistic::mean;  ///< see error_statistic
  index_t queries = 32;                              ///< the last queries of a layer, all where it has fewer
  index_t least = 0;                                 ///< units that every head keeps besides the protected ones
  /// scope::model: scores count relative to the norm of their layer's output, as the errors do. For scores that are
  /// changes of the output (`rest_kv`); for others their plain size may rank layers better.
  bool relative_to_output = true;

  /// Fails on a bound that is negative or not a number, on no queries and on a negative `least`.
  [[nodiscard]] status check() const noexcept {
    if (!(bound >= 0.0)) {
      return status::error(errc::invalid_argument, "error_bounded.bound is %g, must be at least 0", bound);
    }
    if (queries < 1) {
      return status::error(errc::invalid_argument, "error_bounded.queries is %lld, must be at least 1",
                           static_cast<long long>(queries));
    }
    if (least < 0) {
      return status::error(errc::invalid_argument, "error_bounded.least is %lld, must be at least 0",
                           static_cast<long long>(least));
    }
    return {};
  }
};

/// Chooses the smallest cache within a bound, along a policy's ranking: the candidates of a layer (of all layers, with
/// error_scope::model) are put in the order of their scores, all heads and sequences together, and the first n of them
/// are kept besides the protected ones. n is found by bracketing: the exact set error (`output_error`) of what is
/// returned was computed and is within the bound, and that of one unit less was computed and is beyond it. Errors need
/// not fall with every token, so a smaller n within the bound may exist where they do not; sets off the ranking may be
/// smaller too.
///
/// The policy's own budget does not limit anything; it is what an adaptive window and rescorers with `keep` reckon
/// with. Owns its memory and allocates, as `output_error` does with every trial, of which there are about
/// log2(candidates), three times that at most. The result does not depend on the number of threads.
class error_bounded_selection {
 public:
  /// Layers of the last successful run.
  [[nodiscard]] index_t layers() const noexcept { return std::ssize(layers_); }
  /// What a layer keeps. Valid until the next run.
  [[nodiscard]] const_kept_tokens kept(index_t l) const noexcept { return at(l).kept.kept(); }
  /// Units of a layer that were chosen, all heads and sequences together, `least` and protected ones not counted.
  [[nodiscard]] index_t chosen(index_t l) const noexcept { return at(l).chosen; }
  /// Tokens of a layer that are kept, all heads and sequences together.
  [[nodiscard]] index_t tokens(index_t l) const noexcept { return kept(l).total(); }
  /// The layer's error, as the bound's statistic says.
  [[nodiscard]] double error(index_t l) const noexcept { return at(l).error; }
  /// The mean of the layers' errors.
  [[nodiscard]] double mean_error() const noexcept {
    double sum = 0;
    for (const layer_result& layer : layers_) sum += layer.error;
    return layers_.empty() ? 0.0 : sum / static_cast<double>(layers_.size());
  }
  /// Computations of output_error that the last run took.
  [[nodiscard]] index_t evaluations() const noexcept { return evaluations_; }

  /// Selects for `layers`, the model's from the first on or some of them. Errors, with nothing changed: those of
  /// `make_plan`, `select` and `output_error`.
  template <tensor_backend Backend, class Policy, element T>
  [[nodiscard]] status run(Backend& backend, const Policy& policy, std::span<const layer_view<T>> layers,
                           const error_bounded& bound) {
    RESTKV_RETURN_IF_FAILED(bound.check());
    error_bounded_selection made;
    made.layers_.resize(layers.size());
    std::vector<candidate> order;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      RESTKV_RETURN_IF_FAILED(made.rank(backend, policy, layers, l, bound, order));
      if (bound.scope == error_scope::model) continue;
      std::sort(order.begin(), order.end());
      RESTKV_RETURN_IF_FAILED(made.search(backend, layers, l, l + 1, bound, order));
      order.clear();
    }
    if (bound.scope == error_scope::model) {
      std::sort(order.begin(), order.end());
      RESTKV_RETURN_IF_FAILED(made.search(backend, layers, 0, layers.size(), bound, order));
    }
    *this = std::move(made);
    return {};
  }

  /// Refuses layers in the memory of a device: each trial follows from the errors of the one before, which the host
  /// would have to wait for and read.
  template <class Backend, class Policy, element T>
  [[nodiscard]] status run(Backend&, const Policy&, std::span<const layer_view<T, memory_space::device>> layers,
                           const error_bounded&) {
    return status::error(errc::unsupported,
                         "error_bounded looks at the errors of each trial on the host: the %lld layers lie in the "
                         "memory of a device",
                         static_cast<long long>(layers.size()));
  }

 private:
  /// A unit that may be evicted; the first is to be kept first.
  struct candidate {
    std::uint64_t key;
    std::size_t layer;
    index_t row;
    index_t unit;

    [[nodiscard]] friend bool operator<(const candidate& a, const candidate& b) noexcept {
      if (a.key != b.key) return a.key > b.key;
      if (a.layer != b.layer) return a.layer < b.layer;
      return a.row != b.row ? a.row < b.row : a.unit < b.unit;
    }
  };
  struct layer_result {
    owned_kept_tokens kept;
    index_t chosen = 0;
    double error = 0;
    index_t unit = 1;
    index_t rows = 0;    // of a sequence's scores
    index_t copies = 1;  // heads of the kept set that follow a row
    std::vector<sequence_span> spans;             // [batch * rows]
    std::vector<std::vector<std::uint8_t>> held;  // [batch * rows][units]: kept, whatever n
  };

  [[nodiscard]] const layer_result& at(index_t l) const noexcept { return layers_[static_cast<std::size_t>(l)]; }

  /// Appends a layer's candidates to `order`, and notes what is kept in any case.
  template <class Backend, class Policy, element T>
  [[nodiscard]] status rank(Backend& backend, const Policy& policy, std::span<const layer_view<T>> layers,
                            std::size_t l, const error_bounded& bound, std::vector<candidate>& order) {
    using real = typename Backend::score_type;
    const layer_view<T>& layer = layers[l];
    const auto count = static_cast<index_t>(layers.size());
    plan<Policy> made;
    RESTKV_RETURN_IF_FAILED(make_plan(backend, policy, shape_of(layer, static_cast<index_t>(l), count), made));
    double scale = 1;
    if (bound.scope == error_scope::model && bound.relative_to_output) {
      RESTKV_RETURN_IF_FAILED(scale_of(backend, layer, bound, scale));
    }
    std::vector<std::byte> memory(made.workspace_bytes);
    workspace space(memory.data(), memory.size());
    return detail::with_selection_run(
        backend, made, layer, space, nullptr, [&](auto& run, const auto& weigh) -> status {
          RESTKV_RETURN_IF_FAILED(run.rank_all(weigh));
          layer_result& result = layers_[l];
          result.kept = owned_kept_tokens(made.shape.batch, made.heads, made.shape.tokens);
          result.unit = policy.granularity.tokens;
          result.rows = made.rows;
          result.copies = made.heads / std::max<index_t>(made.rows, 1);
          for (index_t row = 0; row < run.rows(); ++row) {
            const auto keys = run.keys_of(row);
            result.spans.push_back(run.problem_of(row).span);
            std::vector<std::uint8_t>& held = result.held.emplace_back(keys.size());
            const auto pivot = find_pivot(tensor_view<const order_key_t<real>, 2>(keys.data(), {1, std::ssize(keys)}),
                                          std::min<index_t>(bound.least, std::ssize(keys)));
            index_t equal_left = pivot.equal;
            for (std::size_t u = 0; u < keys.size(); ++u) {
              held[u] =
                  keys[u] == excluded_key || keys[u] > pivot.key || (keys[u] == pivot.key && equal_left-- > 0) ? 1 : 0;
              if (held[u] != 0) continue;
              const double score = static_cast<double>(score_of_key<real>(keys[u]));
              order.push_back({order_key(score * scale), l, row, static_cast<index_t>(u)});
            }
          }
          return {};
        });
  }

  /// 1 / the root of the sum of squares of the layer's output norms; 1 where that is 0.
  template <class Backend, element T>
  [[nodiscard]] status scale_of(Backend& backend, const layer_view<T>& layer, const error_bounded& bound,
                                double& scale) {
    owned_kept_tokens everything(layer.key.extent(0), layer.key.extent(1), layer.key.extent(2));
    const kept_tokens all = everything.kept();
    for (index_t b = 0; b < all.batch(); ++b) {
      for (index_t h = 0; h < all.heads(); ++h) {
        const sequence_span span = sequence(layer, b, h);
        for (index_t n = 0; n < span.length; ++n) all.positions(b, h, n) = static_cast<position_t>(span.begin + n);
        all.lengths(b, h) = static_cast<position_t>(span.length);
      }
    }
    output_errors errors;
    RESTKV_RETURN_IF_FAILED(output_error(backend, everything, layer, errors, queries_of(layer, bound)));
    double squares = 0;
    for (index_t b = 0; b < errors.batch(); ++b) {
      for (index_t i = 0; i < errors.queries(); ++i) {
        squares += errors.layer_output_norm()(b, i) * errors.layer_output_norm()(b, i);
      }
    }
    scale = squares > 0 ? 1.0 / std::sqrt(squares) : 1.0;
    return {};
  }

  template <element T>
  [[nodiscard]] static index_t queries_of(const layer_view<T>& layer, const error_bounded& bound) noexcept {
    return std::min(bound.queries, layer.query.extent(2));
  }

  /// A bracket of how many units are kept: the error of `beyond` is too large, that of `within` is not.
  struct bracket {
    index_t beyond = -1;
    index_t within = 0;
    double error_beyond = 0;  // 0: not known
    double error_within = 0;  // 0: nothing changes, or not known

    /// A number strictly inside. Errors fall about exponentially: where both are known, by their logarithms; then a
    /// step as wide as the last, doubled, from the end that was hit twice in a row, so that the ends meet; each third
    /// trial halves.
    [[nodiscard]] index_t next(double bound, index_t trial, index_t repeats, bool last_within) const noexcept {
      const index_t half = beyond + (within - beyond) / 2;
      if (!(error_beyond > 0) || !(error_within > 0) || !(bound > 0) || trial % 3 == 2) return half;
      if (repeats > 0) {
        const index_t step = index_t{1} << std::min<index_t>(repeats - 1, 40);
        return last_within ? std::max(half, within - step) : std::min(half, beyond + step);
      }
      const double part = std::log(error_beyond / bound) / std::log(error_beyond / error_within);
      const double guess = static_cast<double>(beyond) + part * static_cast<double>(within - beyond);
      return std::isfinite(guess) ? std::clamp(static_cast<index_t>(std::ceil(guess)), beyond + 1, within - 1) : half;
    }
  };

  /// Finds how many of `order` to keep for layers [begin, end).
  template <class Backend, element T>
  [[nodiscard]] status search(Backend& backend, std::span<const layer_view<T>> layers, std::size_t begin,
                              std::size_t end, const error_bounded& bound, const std::vector<candidate>& order) {
    bracket ends;
    ends.within = std::ssize(order);  // nothing is evicted
    index_t repeats = 0;
    index_t evaluated = -1;
    bool last_within = false;
    double error = 0;
    for (index_t trial = 0; ends.within - ends.beyond > 1; ++trial) {
      const index_t count = ends.next(bound.bound, trial, repeats, last_within);
      RESTKV_RETURN_IF_FAILED(evaluate(backend, layers, begin, end, bound, order, count, error));
      evaluated = count;
      const bool is_within = error <= bound.bound;
      (is_within ? ends.within : ends.beyond) = count;
      (is_within ? ends.error_within : ends.error_beyond) = error;
      repeats = trial > 0 && is_within == last_within ? repeats + 1 : 0;
      last_within = is_within;
    }
    if (evaluated == ends.within) return {};
    return evaluate(backend, layers, begin, end, bound, order, ends.within, error);
  }

  /// Keeps the first `count` of `order` and computes the error of that, the mean over the layers.
  template <class Backend, element T>
  [[nodiscard]] status evaluate(Backend& backend, std::span<const layer_view<T>> layers, std::size_t begin,
                                std::size_t end, const error_bounded& bound, const std::vector<candidate>& order,
                                index_t count, double& error) {
    for (std::size_t l = begin; l < end; ++l) layers_[l].chosen = 0;
    std::vector<std::vector<std::vector<std::uint8_t>>> keeps(end - begin);
    for (std::size_t l = begin; l < end; ++l) keeps[l - begin] = layers_[l].held;
    for (index_t i = 0; i < count; ++i) {
      const candidate& next = order[static_cast<std::size_t>(i)];
      keeps[next.layer - begin][static_cast<std::size_t>(next.row)][static_cast<std::size_t>(next.unit)] = 1;
      ++layers_[next.layer].chosen;
    }
    error = 0;
    for (std::size_t l = begin; l < end; ++l) {
      write(layers_[l], keeps[l - begin]);
      output_errors errors;
      RESTKV_RETURN_IF_FAILED(output_error(backend, layers_[l].kept, layers[l], errors, queries_of(layers[l], bound)));
      ++evaluations_;
      layers_[l].error = bound.statistic == error_statistic::mean ? errors.mean_relative() : errors.worst_relative();
      error += layers_[l].error / static_cast<double>(end - begin);
    }
    return {};
  }

  /// The tokens of the units that are kept.
  static void write(layer_result& layer, const std::vector<std::vector<std::uint8_t>>& keeps) noexcept {
    const kept_tokens out = layer.kept.kept();
    for (std::size_t i = 0; i < keeps.size(); ++i) {
      const index_t b = static_cast<index_t>(i) / layer.rows;
      const index_t first = static_cast<index_t>(i) % layer.rows * layer.copies;
      for (index_t h = first; h < first + layer.copies; ++h) {
        index_t length = 0;
        for (index_t u = 0; u < std::ssize(keeps[i]); ++u) {
          if (keeps[i][static_cast<std::size_t>(u)] == 0) continue;
          for (index_t n = u * layer.unit; n < std::min(layer.spans[i].length, (u + 1) * layer.unit); ++n) {
            out.positions(b, h, length++) = static_cast<position_t>(layer.spans[i].begin + n);
          }
        }
        out.lengths(b, h) = static_cast<position_t>(length);
      }
    }
  }

  std::vector<layer_result> layers_;
  index_t evaluations_ = 0;
};

}  // namespace restkv
