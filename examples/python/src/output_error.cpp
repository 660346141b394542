// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"
#include "functions.hpp"
#include "kept.hpp"
#include "layer.hpp"

#include <restkv/verify/output_error.hpp>

#include <fmt/format.h>

namespace restkv::python {

namespace {

struct errors_value {
  output_errors errors;
  framework from = framework::numpy;
};

errors_value measure(const kept_set& kept, nb::handle query, nb::handle key, nb::handle value,
                     const metric_value* metric, nb::handle w_o, nb::handle lengths, nb::handle head_lengths,
                     const std::string& pad, std::optional<index_t> queries, std::optional<int> threads) {
  if (queries && *queries < 1) {
    throw failure(errc::invalid_argument, fmt::format("queries is {}, must be at least 1", *queries));
  }
  layer_needs needs{.metric = metric != nullptr, .projection = metric != nullptr || !w_o.is_none()};
  layer_input input({query, key, value, metric, w_o, lengths, head_lengths, nb::none(), &pad}, needs);
  const nb::gil_scoped_release unlocked;
  const borrowed_backend backend(threads);
  const layer_view<float> layer = input.widen(*backend);
  errors_value made;
  made.from = input.from();
  require(output_error(*backend, kept.view(), layer, made.errors, queries.value_or(0)));
  return made;
}

/// A table as an array that keeps the errors alive; None where there is none.
template <auto Table>
nb::object table_of(nb::handle self) {
  const auto& value = nb::cast<const errors_value&>(self);
  const auto view = (value.errors.*Table)();
  if (view.data == nullptr) return nb::none();
  return give_array(value.from, view.data, {view.extents.begin(), view.extents.end()}, nb::dtype<double>(), self);
}

}  // namespace

void add_output_error(nb::module_& m) {
  using value = errors_value;
  nb::class_<value>(m, "OutputErrors", R"(What a kept set costs each query, in double: of the heads and of the layer.

With A the attention over all tokens and A_E the part of the evicted ones, o is the full output of a head and o'
that of the attention over the kept tokens. Row i is the i-th of the newest queries, oldest first. Arrays share the
memory of this object.)")
      .def("mean_relative", [](const value& v) { return v.errors.mean_relative(); },
           "Norm of the layer's change relative to that of its output, over all queries of all sequences.")
      .def("worst_relative", [](const value& v) { return v.errors.worst_relative(); },
           "The largest of a single query.")
      .def("greedy_ratio", [](const value& v) { return v.errors.greedy_ratio(); },
           "The layer's change relative to what single deletions predict.")
      .def_prop_ro("projected", [](const value& v) { return v.errors.projected(); },
                   "Whether the layer's figures are measured behind W_O.")
      .def_prop_ro("head", &table_of<&output_errors::head>, nb::sig("def head(self) -> Any"),
                   "||o' - o||. [batch, query_heads, queries]")
      .def_prop_ro("head_output_norm", &table_of<&output_errors::head_output_norm>,
                   nb::sig("def head_output_norm(self) -> Any"), "||o||. [batch, query_heads, queries]")
      .def_prop_ro("head_predicted", &table_of<&output_errors::head_predicted>,
                   nb::sig("def head_predicted(self) -> Any"),
                   "What single deletions predict, summed. [batch, query_heads, queries]")
      .def_prop_ro("head_projected", &table_of<&output_errors::head_projected>,
                   nb::sig("def head_projected(self) -> Any"),
                   "||W[h] (o' - o)||; None without W_O. [batch, query_heads, queries]")
      .def_prop_ro("evicted_mass", &table_of<&output_errors::evicted_mass>, nb::sig("def evicted_mass(self) -> Any"),
                   "A_E. [batch, query_heads, queries]")
      .def_prop_ro("layer", &table_of<&output_errors::layer>, nb::sig("def layer(self) -> Any"),
                   "||sum_h W[h] (o'_h - o_h)||; without W_O of the heads side by side. [batch, queries]")
      .def_prop_ro("layer_output_norm", &table_of<&output_errors::layer_output_norm>,
                   nb::sig("def layer_output_norm(self) -> Any"), "||sum_h W[h] o_h||, likewise. [batch, queries]")
      .def("__repr__", [](const value& v) {
        return fmt::format("<restkv.OutputErrors: {} sequences, {} query heads, {} queries, {:.4g} of the output>",
                           v.errors.batch(), v.errors.query_heads(), v.errors.queries(), v.errors.mean_relative());
      });
  m.def("output_error", &measure, nb::arg("kept"), nb::arg("query").none(), nb::arg("key").none(),
        nb::arg("value").none(), nb::kw_only(),
        nb::arg("metric").none() = nb::none(), nb::arg("w_o") = nb::none(), nb::arg("lengths") = nb::none(),
        nb::arg("head_lengths") = nb::none(), nb::arg("padding") = "left", nb::arg("queries") = nb::none(),
        nb::arg("threads") = nb::none(),
        nb::sig("def output_error(kept: Kept, query: Array, key: Array, value: Array, *, metric: Metric | None = None, "
                "w_o: Array | None = None, lengths: Array | None = None, head_lengths: Array | None = None, "
                "padding: Literal['left', 'right'] = 'left', queries: int | None = None, threads: int | None = None) "
                "-> OutputErrors"),
        R"(How far a kept set changes the output of attention, for the newest queries.

Arrays as `select` takes them. A token that is not kept is missing where the query sees it. With metric or w_o
[hidden, query_heads * head_dim] the layer's change is measured behind W_O. queries: how many of the newest rows of
query, all where it is left out.

The interpreter's lock is not held. Raises Error for arrays or sets that do not fit, and for values that are not
finite. Cost: 4 head_dim multiply-adds a query, head and token in double; with W_O also head_dim^2 / 2 a head and
token.)");
}

}  // namespace restkv::python
