// SPDX-License-Identifier: Apache-2.0
// A GPU keeps by codes what it keeps by the numbers that they stand for. Skipped without a GPU.
#include "cuda/quantised_on_device.hpp"
#include "cuda/device_selection.hpp"
#include "support/catch.hpp"
#include "support/random_layer.hpp"

#include <restkv/cache/quantise.hpp>

using namespace restkv_test;
using namespace restkv;

TEST_CASE("a GPU selects from quantised caches as from dequantised ones") {
  if (!has_device()) SKIP("no GPU was found");
  struct format_case {
    code_format format;
    quantisation_kind kind;
    index_t tokens_per_group, channels_per_group;
  };
  const format_case cases[] = {{{.bits = 8}, quantisation_kind::symmetric, 1, 128},
                               {{.bits = 8, .e4m3 = true}, quantisation_kind::symmetric, 1, 128},
                               {{.bits = 4, .is_signed = false}, quantisation_kind::zero, 1, 32},
                               {{.bits = 2, .is_signed = false}, quantisation_kind::offset, 32, 1}};
  for (const format_case& how : cases) {
    for (const index_t head_dim : {64, 128, 80}) {
      random_engine random(static_cast<unsigned>(head_dim));
      random_layer<bfloat16> layer(random, {.batch = 2, .head_dim = head_dim, .tokens = 1500, .hidden = 0});
      struct cache {
        std::vector<std::uint8_t> codes;
        std::vector<float> scale, second;
        quantised_view<float> view;
      };
      const auto make = [&](cache& made, const tensor_view<bfloat16, 4>& numbers) {
        quantised_view<float>& view = made.view;
        view.tokens = 1500;
        view.channels = head_dim;
        view.tokens_per_group = how.tokens_per_group;
        view.channels_per_group = std::min(how.channels_per_group, head_dim);
        view.format = how.format;
        const std::array parameters{index_t{2}, index_t{2}, (1500 + how.tokens_per_group - 1) / how.tokens_per_group,
                                    (head_dim + view.channels_per_group - 1) / view.channels_per_group};
        made.codes.resize(static_cast<std::size_t>(2 * 2 * 1500 * how.format.bytes(head_dim)));
        made.scale.assign(static_cast<std::size_t>(2 * 2 * parameters[2] * parameters[3]), 0.125f);
        made.second = made.scale;
        view.codes = {made.codes.data(), {2, 2, 1500, how.format.bytes(head_dim)}};
        view.scale = {made.scale.data(), parameters};
        if (how.kind == quantisation_kind::zero) view.zero = {made.second.data(), parameters};
        if (how.kind == quantisation_kind::offset) view.offset = {made.second.data(), parameters};
        if (how.format.e4m3) {
          for (auto& code : made.codes)
            code = static_cast<std::uint8_t>(pick(random, 0, 0x7d) | pick(random, 0, 1) << 7);
        } else {
          REQUIRE(quantise(numbers, view).ok());
        }
        REQUIRE(dequantise(view, numbers).ok());
      };
      cache key, value;
      make(key, layer.key.view());
      make(value, layer.value.view());
      quantised_policy policy;
      policy.window = 16;
      policy.budget.budget = 200;
      kept_rows by_numbers, by_codes;
      const status done = select_quantised_on_device(policy, layer.view(), key.view, value.view, by_numbers, by_codes);
      INFO(done.message());
      REQUIRE(done.ok());
      CHECK(by_codes == by_numbers);
    }
  }
}
