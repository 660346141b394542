// SPDX-License-Identifier: Apache-2.0
/// @file
/// From a configuration to its score of tokens, as a known type: in groups, which are instantiated in sources of their
/// own.
#pragma once

#include "policy_parts.hpp"

#include <restkv/score/an_d_pro.hpp>
#include <restkv/score/caote.hpp>
#include <restkv/score/drop_kv.hpp>
#include <restkv/score/keyformer.hpp>
#include <restkv/score/la_prox.hpp>
#include <restkv/score/ob_cache.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/score/vatp.hpp>

namespace restkv::cli {

/// What the scores of a configuration look at, and how they are grouped.
enum class score_group {
  deletion,   ///< restkv, caote: `rest_kv_of`
  attention,  ///< the window's attention: `with_attention_score`
  sizes,      ///< attention and the sizes of values: `with_size_score`
  outputs,    ///< attention and the outputs of heads: `with_output_score`
  positions,  ///< `position_score_of`
  rescored,   ///< attention with a rescoring that a method brings
  heads       ///< whole heads: `head_score_of`, `query_head_score_of`
};

/// The group of a method.
[[nodiscard]] constexpr score_group group_of(method_kind method) noexcept {
  switch (method) {
    case method_kind::snapkv:
    case method_kind::adakv:
    case method_kind::criticalkv:
    case method_kind::keyformer:
    case method_kind::h2o:
    case method_kind::tova: return score_group::attention;
    case method_kind::lava:
    case method_kind::defensivekv:
    case method_kind::rkv: return score_group::rescored;
    case method_kind::fastcaote:
    case method_kind::vatp:
    case method_kind::laprox: return score_group::sizes;
    case method_kind::dropkv:
    case method_kind::obcache:
    case method_kind::andpro: return score_group::outputs;
    case method_kind::knorm:
    case method_kind::keydiff:
    case method_kind::lagkv:
    case method_kind::curdkv:
    case method_kind::leverage:
    case method_kind::expectedattention:
    case method_kind::qfilter:
    case method_kind::capkv:
    case method_kind::keyredundancy:
    case method_kind::valuerange:
    case method_kind::lacache: return score_group::heads;
    case method_kind::streamingllm:
    case method_kind::random: return score_group::positions;
    case method_kind::restkv:
    case method_kind::caote:
    case method_kind::set_error: break;
  }
  return score_group::deletion;
}

///@{
/// Returns use(score) for a method of the group, before any rescoring.
template <class Use>
auto with_attention_score(const configuration& c, const Use& use) {
  switch (c.method) {
    case method_kind::keyformer: return use(keyformer{.temperature = c.temperature, .seed = c.seed});
    case method_kind::h2o:
    case method_kind::tova: return use(observed_attention{});
    default: return use(snap_kv{});
  }
}
template <class Use>
auto with_size_score(const configuration& c, const Use& use) {
  switch (c.method) {
    case method_kind::vatp: return use(vatp{});
    case method_kind::fastcaote: return use(fast_caote{});
    default: return use(la_prox{.metric_of_distance = c.use_wo ? metric::projection : metric::identity});
  }
}
template <class Use>
auto with_output_score(const configuration& c, const Use& use) {
  switch (c.method) {
    case method_kind::obcache: return use(ob_cache{.part = c.part});
    case method_kind::andpro:
      return use(an_d_pro{.metric_of_distance = c.use_wo ? metric::projection : metric::identity});
    default: return use(drop_kv{.epsilon = c.epsilon});
  }
}
///@}

}  // namespace restkv::cli
