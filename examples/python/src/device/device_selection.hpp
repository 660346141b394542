// SPDX-License-Identifier: Apache-2.0
/// @file
/// From a configuration to a policy of known types, run on a `kernel_backend`. Groups of scores are instantiated in
/// sources of their own, which compile side by side.
#pragma once

#include "device_library.hpp"

#include "configuration.hpp"
#include "policy_parts.hpp"
#include "token_scores.hpp"

#include <restkv/select.hpp>

namespace restkv::python {

/// Copies a kept set out of a workspace; -1 behind a head's own. For each place.
template <memory_space Space>
struct copy_kept {
  basic_kept_tokens<position_t, Space> from;
  device_kept to;

  RESTKV_HD void operator()(index_t i) const noexcept {
    const index_t row = i / to.room;
    const index_t slot = i % to.room;
    const index_t b = row / to.heads;
    const index_t h = row % to.heads;
    const position_t length = from.lengths.data[from.lengths.offset(b, h)];
    if (slot == 0) to.lengths[row] = length;
    to.positions[i] = slot < length ? from.positions.data[from.positions.offset(b, h, slot)] : position_t{-1};
  }
};

/// `select` by a policy of known types, on a layer in the backend's memory.
template <class Backend, class Policy, element T>
[[nodiscard]] status select_by(Backend& backend, const Policy& policy, const problem_shape& shape,
                               const layer_view<T, Backend::space>& layer, device_memory& memory) {
  plan<Policy> made;
  RESTKV_RETURN_IF_FAILED(make_plan(backend, policy, shape, made));
  basic_kept_tokens<position_t, Backend::space> kept;
  RESTKV_RETURN_IF_FAILED(
      select(backend, made, layer, workspace(memory.scratch(made.workspace_bytes), made.workspace_bytes), kept));
  // One place at least, so that lengths are written where nothing is kept.
  const device_kept out = memory.kept(shape.batch, made.heads, std::max<index_t>(made.capacity, 1));
  return backend.for_each(out.batch * out.heads * out.room, copy_kept<Backend::space>{kept, out});
}

/// Selects with the scores of a group, as `configuration` says. No rescoring, and no budget over layers.
template <cli::score_group Group, class Backend, element T>
[[nodiscard]] status select_group(Backend& backend, const cli::configuration& c,
                                  const layer_view<T, Backend::space>& layer, device_memory& memory) {
  const problem_shape shape = shape_of(layer, c.layer_index, c.layer_count);
  const auto run = [&](const auto& score) -> status {
    const auto policy = cli::policy_with(c, score, c.window_of(layer));
    // Of budgets a device wants a known type.
    const auto with = [&](const auto& budget) {
      return select_by(backend, with_parts(policy, policy.score, policy.temporal, budget), shape, layer, memory);
    };
    return std::visit(
        [&](const auto& budget) -> status {
          using budget_t = std::remove_cvref_t<decltype(budget)>;
          if constexpr (cli::is_configured_budget<budget_t>) return with(budget);
          return status::error(errc::unsupported, "a budget that no configuration describes");
        },
        policy.budget.choice);
  };
  if constexpr (Group == cli::score_group::deletion) return run(cli::rest_kv_of(c));
  if constexpr (Group == cli::score_group::attention) return cli::with_attention_score(c, run);
  if constexpr (Group == cli::score_group::sizes) return cli::with_size_score(c, run);
  if constexpr (Group == cli::score_group::outputs) return cli::with_output_score(c, run);
  if constexpr (Group == cli::score_group::positions) return run(cli::position_score_of(c));
}

}  // namespace restkv::python

/// Instantiates a group for an element type. `PREFIX` is `extern` or empty.
#define RESTKV_PYTHON_SCORES(PREFIX, BACKEND, GROUP, T)                                                     \
  PREFIX template restkv::status restkv::python::select_group<restkv::cli::score_group::GROUP, BACKEND, T>( \
      BACKEND&, const restkv::cli::configuration&, const restkv::layer_view<T, BACKEND::space>&,            \
      restkv::python::device_memory&);
/// All groups.
#define RESTKV_PYTHON_ALL_SCORES(PREFIX, BACKEND, T)  \
  RESTKV_PYTHON_SCORES(PREFIX, BACKEND, deletion, T)  \
  RESTKV_PYTHON_SCORES(PREFIX, BACKEND, attention, T) \
  RESTKV_PYTHON_SCORES(PREFIX, BACKEND, sizes, T)     \
  RESTKV_PYTHON_SCORES(PREFIX, BACKEND, outputs, T)   \
  RESTKV_PYTHON_SCORES(PREFIX, BACKEND, positions, T)
