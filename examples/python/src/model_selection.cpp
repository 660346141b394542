// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"
#include "exclusive_use.hpp"
#include "functions.hpp"
#include "kept.hpp"
#include "layer.hpp"
#include "policy.hpp"

#include "layers_selection.hpp"

#include <fmt/format.h>

namespace restkv::python {

namespace {

/// `restkv.ModelSelection`.
class model_selection_value {
 public:
  model_selection_value(policy policy, index_t layers, std::optional<index_t> tokens, std::optional<int> threads)
      : policy_(std::move(policy)), layers_(layers), tokens_(tokens), threads_(threads.value_or(default_threads())) {
    if (!policy_.c.over_layers()) {
      throw failure(errc::unsupported,
                    fmt::format("the allocation {} is of each layer by itself: see select and select_layers",
                                cli::name_of(policy_.c.allocation)));
    }
    if (layers < 1) throw failure(errc::invalid_argument, fmt::format("layers is {}, must be at least 1", layers));
    if (tokens && *tokens < 0) {
      throw failure(errc::invalid_argument, fmt::format("tokens is {}, must be at least 0", *tokens));
    }
  }

  void add(nb::handle query, nb::handle key, nb::handle value, metric_value* metric, nb::handle w_o, nb::handle lengths,
           nb::handle head_lengths, nb::handle keep_mask, const std::string& pad) {
    layer_input input({query, key, value, metric, w_o, lengths, head_lengths, keep_mask, &pad}, needs_of(policy_.c));
    const exclusive_use use(used_, "selection");
    const nb::gil_scoped_release unlocked;
    const borrowed_backend backend(threads_);
    const layer_view<float> layer = input.widen(*backend);
    if (!run_) {
      problem_shape shape = shape_of(layer, 0, layers_);
      shape.tokens = tokens_.value_or(shape.tokens);
      cli::layers_selection made(policy_.c, *backend, shape);
      made.add_layer(*backend, layer);
      run_.emplace(std::move(made));
      from_ = input.from();
    } else {
      run_->add_layer(*backend, layer);
    }
  }

  [[nodiscard]] kept_set kept(index_t layer) {
    const exclusive_use use(used_, "selection");
    check_layer_index(layer);
    return trimmed(run_->kept(layer), from_);
  }
  [[nodiscard]] kept_set cache_slots(index_t layer) {
    const exclusive_use use(used_, "selection");
    check_layer_index(layer);
    return trimmed(run_->cache_slots(layer), from_);
  }
  [[nodiscard]] bool evicted(index_t layer) {
    const exclusive_use use(used_, "selection");
    check_layer_index(layer);
    return run_->evicted(layer);
  }
  [[nodiscard]] index_t layers() const noexcept { return run_ ? run_->layers() : 0; }
  [[nodiscard]] index_t layer_count() const noexcept { return layers_; }
  [[nodiscard]] const policy& policy_of() const noexcept { return policy_; }

 private:
  void check_layer_index(index_t layer) const {
    if (layer >= 0 && layer < layers()) return;
    throw failure(errc::invalid_argument,
                  fmt::format("layer {} is not there: {} of {} layers came in", layer, layers(), layers_));
  }

  policy policy_;
  index_t layers_;
  std::optional<index_t> tokens_;
  int threads_;
  framework from_ = framework::numpy;
  std::atomic<bool> used_ = false;
  std::optional<cli::layers_selection> run_;  // from the first layer on
};

}  // namespace

void add_model_selection(nb::module_& m) {
  using value = model_selection_value;
  nb::class_<value>(m, "ModelSelection", R"(One choice over all layers of a model, which come in one by one.

For policies with `over_layers`. After each layer those that came in are within the model's budget, so that a prefill
that compacts as it goes never holds more than the budget and one layer; after the last one the sets are those of one
choice over all layers at once. Nothing of a layer is needed after `add` but for compacting. The model keeps layers *
heads * budget tokens of each sequence. `select_layers` is the same for layers that are all at hand.)")
      .def(nb::init<policy, index_t, std::optional<index_t>, std::optional<int>>(), nb::arg("policy"),
           nb::arg("layers"), nb::kw_only(), nb::arg("tokens") = nb::none(), nb::arg("threads") = nb::none(),
           R"(layers: how many will come. tokens: most of a layer, those of the first one where it is left out.

Raises Error for policies whose budget is of each layer by itself.)")
      .def("add", &value::add, nb::arg("query").none(), nb::arg("key").none(), nb::arg("value").none(), nb::kw_only(),
           nb::arg("metric").none() = nb::none(), nb::arg("w_o") = nb::none(), nb::arg("lengths") = nb::none(),
           nb::arg("head_lengths") = nb::none(), nb::arg("keep_mask") = nb::none(), nb::arg("padding") = "left",
           nb::sig("def add(self, query: Array | None, key: Array, value: Array | None, *, "
                   "metric: Metric | None = None, w_o: Array | None = None, lengths: Array | None = None, "
                   "head_lengths: Array | None = None, keep_mask: Array | None = None, "
                   "padding: Literal['left', 'right'] = 'left') -> None"),
           R"(Ranks the next layer, and evicts from it and from those before what is beyond the budget.

Arguments as of `select`. The interpreter's lock is not held. Raises Error, with nothing changed, for arrays that do not
fit each other, the first layer or the policy, and for a layer too many. Cost: that of ranking the layer, and 3 passes
over what is kept so far.)")
      .def("kept", &value::kept, nb::arg("layer"),
           "Positions that a layer keeps so far, of the layer as it came in. Raises Error for layers that did not.")
      .def("cache_slots", &value::cache_slots, nb::arg("layer"),
           "The same tokens by where they lie in a cache that was compacted after each layer: what `compact` is given "
           "in a prefill that compacts as it goes.")
      .def("evicted", &value::evicted, nb::arg("layer"),
           "Whether the layer that came in last took tokens from this one: whether its cache is to be compacted.")
      .def_prop_ro("layers", &value::layers, "Layers that came in.")
      .def_prop_ro("layer_count", &value::layer_count, "Layers of the model.")
      .def_prop_ro("policy", [](const value& v) -> policy { return v.policy_of(); })
      .def("__repr__", [](const value& v) {
        return fmt::format("<restkv.ModelSelection: {} of {} layers, {} tokens a head in the mean>", v.layers(),
                           v.layer_count(), v.policy_of().c.budget);
      });
}

}  // namespace restkv::python
