// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"
#include "functions.hpp"
#include "kept.hpp"
#include "layer.hpp"

#include <restkv/verify/output_error.hpp>

#include <fmt/format.h>

namespace restkv::python {

namespace {

/// The figures, or where a device writes them.
struct errors_value {
  output_errors errors;
  framework from = framework::numpy;
  nb::object tables;  ///< on a device: all of them, behind each other
  output_error_plan plan;
  std::vector<std::int32_t> lengths;  ///< of the layer that is measured
  std::vector<std::int32_t> head_lengths;
  std::optional<array_place> place;
  bool fetched = true;

  /// The figures on the host. Waits for the device where they are there only.
  const output_errors& fetch() {
    if (fetched) return errors;
    const array copied = take_array(on_host(*place, tables), "tables", {.rank = 1, .axes = "[elements]"});
    const problem_shape& shape = plan.shape;
    layer_view<float> layer;  // what is read of it are its lengths
    layer.key = tensor_view<const float, 4>(nullptr, {shape.batch, shape.kv_heads, shape.tokens, shape.head_dim});
    if (!lengths.empty()) layer.lengths = {lengths.data(), {shape.batch}};
    if (!head_lengths.empty()) layer.head_lengths = {head_lengths.data(), {shape.batch, shape.kv_heads}};
    require(read_output_errors(plan, layer, std::span(static_cast<const double*>(copied.data),
                                                      static_cast<std::size_t>(copied.size())),
                               errors));
    fetched = true;
    return errors;
  }
};

template <std::size_t Rank>
std::vector<std::int32_t> copy_of(const tensor_view<const std::int32_t, Rank>& from) {
  return from.data == nullptr ? std::vector<std::int32_t>() : std::vector(from.data, from.data + from.size());
}

errors_value measure_on(device_library& library, kept_set& kept, layer_input& input, std::optional<index_t> queries) {
  const array_place place = input.place();
  call_memory memory(place);
  const device_layer layer = input.on_device();
  const kept_on_device set = set_at(kept, place, input.tokens());
  const device_call call = call_at(place);
  errors_value made;
  {
    const nb::gil_scoped_release unlocked;
    require(library.measure(call, set.set, layer, queries.value_or(layer.query.extents[2]), memory, made.plan));
  }
  made.from = place.from;
  made.tables = memory.figures;
  made.lengths = copy_of(layer.lengths);
  made.head_lengths = copy_of(layer.head_lengths);
  made.place = place;
  made.fetched = false;
  return made;
}

errors_value measure(kept_set& kept, nb::handle query, nb::handle key, nb::handle value, metric_value* metric,
                     nb::handle w_o, nb::handle lengths, nb::handle head_lengths, const std::string& pad,
                     std::optional<index_t> queries, std::optional<int> threads) {
  if (queries && *queries < 1) {
    throw failure(errc::invalid_argument, fmt::format("queries is {}, must be at least 1", *queries));
  }
  const layer_needs needs{.metric = metric != nullptr, .projection = metric != nullptr || !w_o.is_none()};
  layer_input input({query, key, value, metric, w_o, lengths, head_lengths, nb::none(), &pad}, needs, true);
  if (device_library* const library = input.place().library()) return measure_on(*library, kept, input, queries);
  kept.fetch();
  const nb::gil_scoped_release unlocked;
  const borrowed_backend backend(threads);
  const layer_view<float> layer = input.widen(*backend);
  errors_value made;
  made.from = input.from();
  require(output_error(*backend, kept.view(), layer, made.errors, queries.value_or(0)));
  return made;
}

/// A table as an array that keeps the errors alive; None where there is none.
template <auto Table, auto Place>
nb::object table_of(nb::handle self) {
  auto& value = nb::cast<errors_value&>(self);
  if (!value.fetched) {
    constexpr bool of_heads = std::is_same_v<decltype(Place), output_error_plan::head_table>;
    if constexpr (of_heads) {
      if (Place == output_error_plan::head_projected && !value.plan.options.metric) return nb::none();
    }
    const problem_shape& shape = value.plan.shape;
    nb::list extents;
    extents.append(shape.batch);
    if (of_heads) extents.append(shape.query_heads);
    extents.append(value.plan.options.queries);
    const index_t begin = value.plan.begin(Place);
    const index_t count = shape.batch * (of_heads ? shape.query_heads : 1) * value.plan.options.queries;
    return value.tables[nb::slice(begin, begin + count)].attr("reshape")(nb::tuple(extents));
  }
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
      .def("mean_relative", [](value& v) { return v.fetch().mean_relative(); },
           "Norm of the layer's change relative to that of its output, over all queries of all sequences.")
      .def("worst_relative", [](value& v) { return v.fetch().worst_relative(); },
           "The largest of a single query.")
      .def("greedy_ratio", [](value& v) { return v.fetch().greedy_ratio(); },
           "The layer's change relative to what single deletions predict.")
      .def_prop_ro("projected", [](value& v) { return v.fetch().projected(); },
                   "Whether the layer's figures are measured behind W_O.")
      .def_prop_ro("head", &table_of<&output_errors::head, output_error_plan::head>, nb::sig("def head(self) -> Any"),
                   "||o' - o||. [batch, query_heads, queries]")
      .def_prop_ro("head_output_norm",
                   &table_of<&output_errors::head_output_norm, output_error_plan::head_output_norm>,
                   nb::sig("def head_output_norm(self) -> Any"), "||o||. [batch, query_heads, queries]")
      .def_prop_ro("head_predicted", &table_of<&output_errors::head_predicted, output_error_plan::head_predicted>,
                   nb::sig("def head_predicted(self) -> Any"),
                   "What single deletions predict, summed. [batch, query_heads, queries]")
      .def_prop_ro("head_projected", &table_of<&output_errors::head_projected, output_error_plan::head_projected>,
                   nb::sig("def head_projected(self) -> Any"),
                   "||W[h] (o' - o)||; None without W_O. [batch, query_heads, queries]")
      .def_prop_ro("evicted_mass", &table_of<&output_errors::evicted_mass, output_error_plan::evicted_mass>,
                   nb::sig("def evicted_mass(self) -> Any"),
                   "A_E. [batch, query_heads, queries]")
      .def_prop_ro("layer", &table_of<&output_errors::layer, output_error_plan::layer>,
                   nb::sig("def layer(self) -> Any"),
                   "||sum_h W[h] (o'_h - o_h)||; without W_O of the heads side by side. [batch, queries]")
      .def_prop_ro("layer_output_norm",
                   &table_of<&output_errors::layer_output_norm, output_error_plan::layer_output_norm>,
                   nb::sig("def layer_output_norm(self) -> Any"), "||sum_h W[h] o_h||, likewise. [batch, queries]")
      .def("__repr__", [](value& v) {
        const output_errors& errors = v.fetch();
        return fmt::format("<restkv.OutputErrors: {} sequences, {} query heads, {} queries, {:.4g} of the output>",
                           errors.batch(), errors.query_heads(), errors.queries(), errors.mean_relative());
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

Arrays as `select` takes them; those on a GPU are measured there, and their figures are waited for where they are asked
for. A token that is not kept is missing where the query sees it. With metric or w_o
[hidden, query_heads * head_dim] the layer's change is measured behind W_O. queries: how many of the newest rows of
query, all where it is left out.

The interpreter's lock is not held. Raises Error for arrays or sets that do not fit, and for values that are not
finite. Cost: 4 head_dim multiply-adds a query, head and token in double; with W_O also head_dim^2 / 2 a head and
token.)");
}

}  // namespace restkv::python
