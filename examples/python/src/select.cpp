// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"
#include "functions.hpp"
#include "kept.hpp"
#include "layer.hpp"
#include "policy.hpp"

#include "selection.hpp"

#include <fmt/format.h>

namespace restkv::python {

namespace {

kept_set select_on(device_library& library, const cli::configuration& c, layer_input& input) {
  call_memory memory(input.place());
  const device_layer layer = input.on_device();
  const device_call call = call_at(input.place());
  {
    const nb::gil_scoped_release unlocked;
    require(library.select(call, c, layer, memory));
  }
  return kept_of(memory, input.place(), input.tokens());
}

kept_set select(const policy& policy, nb::handle query, nb::handle key, nb::handle value, metric_value* metric,
                nb::handle w_o, nb::handle lengths, nb::handle head_lengths, nb::handle keep_mask,
                const std::string& pad, std::optional<index_t> layer_index, std::optional<index_t> layer_count,
                std::optional<int> threads) {
  const cli::configuration c = policy.at_layer(layer_index, layer_count);
  if (c.over_layers()) {
    throw failure(errc::unsupported,
                  fmt::format("the allocation {} is over the layers of a model, one layer has no share of it: see "
                              "select_layers and ModelSelection",
                              cli::name_of(c.allocation)));
  }
  layer_input input({query, key, value, metric, w_o, lengths, head_lengths, keep_mask, &pad}, needs_of(c), true);
  if (device_library* const library = input.place().library()) return select_on(*library, c, input);
  const nb::gil_scoped_release unlocked;
  const borrowed_backend backend(threads);
  const layer_view<float> layer = input.widen(*backend);
  const cli::selection chosen = cli::run_eigen(c, layer, *backend, "", cli::inspection::kept_only);
  return trimmed(chosen.kept(), input.from());
}

}  // namespace

void add_select(nb::module_& m) {
  m.def("select", &select, nb::arg("policy"), nb::arg("query").none(), nb::arg("key").none(), nb::arg("value").none(),
        nb::kw_only(), nb::arg("metric").none() = nb::none(), nb::arg("w_o") = nb::none(),
        nb::arg("lengths") = nb::none(), nb::arg("head_lengths") = nb::none(), nb::arg("keep_mask") = nb::none(),
        nb::arg("padding") = "left", nb::arg("layer_index") = nb::none(), nb::arg("layer_count") = nb::none(),
        nb::arg("threads") = nb::none(),
        nb::sig("def select(policy: Policy, query: Array | None, key: Array, value: Array | None, *, "
                "metric: Metric | None = None, w_o: Array | None = None, lengths: Array | None = None, "
                "head_lengths: Array | None = None, keep_mask: Array | None = None, "
                "padding: Literal['left', 'right'] = 'left', layer_index: int | None = None, "
                "layer_count: int | None = None, threads: int | None = None) -> Kept"),
        R"(Chooses the tokens of one layer that each head keeps.

query: [batch, query_heads, queries, head_dim], the newest queries, oldest first, at least those of the policy's
window; after RoPE, scaled so that a logit is query . key / sqrt(head_dim). None where the policy looks at none
(`Policy.needs`); then the heads are the KV heads, or those of the metric. key, value: [batch, kv_heads, tokens,
head_dim], keys after RoPE; value may be None where the policy does not look at values. Arrays of any library that
speaks DLPack, with any strides. float32 is read in place; what the policy reads of float16, bfloat16
and float64 is widened (float64: rounded) to float32 first, for the length of the call.

metric, or w_o [hidden, query_heads * head_dim] from which one is made each time: for policies with `needs_w_o`.
lengths: [batch], tokens of each sequence where they differ, with their padding. head_lengths: [batch, kv_heads]
instead, for a cache whose heads differ. keep_mask: [batch, tokens], not 0 where a token is never evicted.
layer_index, layer_count: the layer's place in the model, for policies that depend on it. threads: those of this
call, else OMP_NUM_THREADS or the CPUs.

Arrays on a GPU, where the module was built with CUDA: of PyTorch or CuPy, all on one device and of one type, float32,
float16 or bfloat16; lengths and masks stay on the host. Everything is enqueued on the caller's current stream, and the
`Kept` lies on the GPU. Policies that score whole heads or rescore run on the CPU alone: Error, `unsupported`.

Sequences that fit their budget keep everything. Kept positions are indices of the token axis. The interpreter's
lock is not held. Raises Error for arrays that do not fit each other or the policy.)");
}

}  // namespace restkv::python
