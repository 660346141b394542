// SPDX-License-Identifier: Apache-2.0
#include "layer.hpp"

#include "backends.hpp"

#include "configuration.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace restkv::python {

namespace {

constexpr array_rules query_rules{.rank = 4, .axes = "[batch, query_heads, queries, head_dim]"};
constexpr array_rules cache_rules{.rank = 4, .axes = "[batch, kv_heads, tokens, head_dim]"};
constexpr array_rules w_o_rules{.rank = 2, .axes = "[hidden, query_heads * head_dim]", .detach = true};
constexpr array_rules lengths_rules{.rank = 1, .axes = "[batch]"};
constexpr array_rules head_lengths_rules{.rank = 2, .axes = "[batch, kv_heads]"};
constexpr array_rules keep_mask_rules{.rank = 2, .axes = "[batch, tokens]"};

padding padding_of(const std::string& name) {
  if (name == "left") return padding::left;
  if (name == "right") return padding::right;
  throw failure(errc::invalid_argument, fmt::format("padding is '{}', must be 'left' or 'right'", name));
}

/// That two arrays have the same extent where both have that axis.
void check_axis(const array& a, const array& b, std::size_t axis, const char* what) {
  if (a.extents[axis] == b.extents[axis]) return;
  throw failure(errc::shape_mismatch, fmt::format("{} has {} {}, {} has {}", a.name, a.extents[axis], what, b.name,
                                                  b.extents[axis]));
}

/// That two arrays lie at one place.
void check_place(const array& a, const array& b) {
  if (a.device_type == b.device_type && a.device == b.device) return;
  throw failure(errc::invalid_argument, fmt::format("{} lies on {}, {} on {}", a.name, array_place(a).text(), b.name,
                                                    array_place(b).text()));
}

/// A tensor like another whose elements nobody reads: they are all one.
tensor_view<const float, 4> unread(const array& like) {
  static constexpr float element = 0.0f;
  tensor_view<const float, 4> made = like.view_as<const float, 4>();
  made.data = &element;
  made.strides = {};
  return made;
}

metric_value make_metric(nb::handle w_o, index_t query_heads, std::optional<int> threads) {
  metric_value made;
  array_rules rules = w_o_rules;
  rules.devices = true;
  made.w_o = take_array(w_o, "w_o", rules);
  made.given = made.w_o.object;
  // Prepared on the CPU, once.
  if (made.w_o.device_type != host_device) {
    made.w_o = take_array(on_host(array_place(made.w_o), made.given), "w_o", w_o_rules);
  }
  if (query_heads < 1 || made.w_o.extents[1] % query_heads != 0) {
    throw failure(errc::shape_mismatch, fmt::format("w_o has {} columns: {} query heads cannot share them",
                                                    made.w_o.extents[1], query_heads));
  }
  made.query_heads = query_heads;
  made.head_dim = made.w_o.extents[1] / query_heads;
  const nb::gil_scoped_release unlocked;
  const borrowed_backend backend(threads);
  float_tensor<2> rows;
  rows.read(*backend, made.w_o);
  require(made.metric.build(rows.view(), made.query_heads, made.head_dim));
  return made;
}

/// A part of a metric at a place, and what it is there.
template <class T, std::size_t Rank>
nb::object copied(const array_place& place, const tensor_view<const T, Rank>& part) {
  const nb::object whole = give_array(framework::numpy, part.data, {part.extents.begin(), part.extents.end()},
                                      nb::dtype<T>(), nb::none());
  return moved_to(place, whole);
}

template <class T, std::size_t Rank>
device_tensor tensor_of_part(const array_place& place, const nb::object& copy, const tensor_view<const T, Rank>& like) {
  device_tensor made{.given = true, .data = address_of(place, copy), .item_bytes = sizeof(T)};
  std::copy(like.extents.begin(), like.extents.end(), made.extents.begin());
  std::copy(like.strides.begin(), like.strides.end(), made.strides.begin());
  return made;
}

/// The metric's copy at a place, made where there is none.
const metric_arrays& metric_at(metric_value& metric, const array_place& place) {
  const auto at = std::find_if(metric.copies.begin(), metric.copies.end(),
                               [&](const metric_arrays& copy) { return copy.place == place; });
  if (at != metric.copies.end()) return *at;
  const output_metric_view view = metric.metric.view();
  return metric.copies.emplace_back(
      metric_arrays{place, copied(place, view.gram), copied(place, view.factor), copied(place, view.spectrum)});
}

}  // namespace

layer_needs needs_of(const cli::configuration& c) {
  return {.query = c.reads_queries(),
          .query_rows = c.observes() && !c.observes_every_query() ? c.window : -1,
          .key = c.reads_keys(),
          .value = c.reads_values(),
          .metric = c.measures_through_wo(),
          .projection = c.needs_wo() && !c.measures_through_wo()};
}

layer_input::layer_input(const layer_arguments& from, const layer_needs& needs, bool devices)
    : needs_(needs), metric_(from.metric), pad_(padding_of(*from.pad)) {
  const auto take = [devices](nb::handle object, const char* name, array_rules rules) {
    rules.devices = devices;
    return take_array(object, name, rules);
  };
  key_ = take(from.key, "key", cache_rules);
  if (needs.value || !from.value.is_none()) value_ = take(from.value, "value", cache_rules);
  if (needs.query || !from.query.is_none()) query_ = take(from.query, "query", query_rules);
  for (const array* const other : {&value_, &query_}) {
    if (!other->missing()) check_place(*other, key_);
  }
  if (!value_.missing()) {
    check_axis(value_, key_, 0, "sequences");
    check_axis(value_, key_, 1, "heads");
    check_axis(value_, key_, 2, "tokens");
    check_axis(value_, key_, 3, "channels");
  }
  if (!query_.missing()) {
    check_axis(query_, key_, 0, "sequences");
    check_axis(query_, key_, 3, "channels");
    if (query_.extents[2] > key_.extents[2]) {
      throw failure(errc::shape_mismatch, fmt::format("query has {} queries, key has {} tokens: it holds their newest",
                                                      query_.extents[2], key_.extents[2]));
    }
    // With right padding a query for each token lies where its token does.
    const bool follows_padding =
        !from.lengths.is_none() && pad_ == padding::right && query_.extents[2] == key_.extents[2];
    if (needs.query_rows >= 0 && !follows_padding) query_.keep_last(2, needs.query_rows);
  }
  if (!from.w_o.is_none()) {
    if (metric_ != nullptr) throw failure(errc::invalid_argument, "metric and w_o exclude each other");
    if (needs.metric || needs.projection) {
      w_o_ = take(from.w_o, "w_o", w_o_rules);
      given_w_o_ = w_o_.object;
      if (w_o_.device_type != host_device) {
        w_o_ = take_array(on_host(array_place(w_o_), given_w_o_), "w_o", w_o_rules);
      }
    }
  } else if (metric_ != nullptr && needs.projection) {
    w_o_ = metric_->w_o;
    given_w_o_ = metric_->given;
  }
  if ((needs.metric && metric_ == nullptr && w_o_.missing()) || (needs.projection && w_o_.missing())) {
    throw failure(errc::missing_input, "the policy measures through W_O: give a metric (see Metric) or w_o");
  }
  if (!from.lengths.is_none()) lengths_ = take_integers(from.lengths, "lengths", lengths_rules, lengths_extents_);
  if (!from.head_lengths.is_none()) {
    head_lengths_ = take_integers(from.head_lengths, "head_lengths", head_lengths_rules, head_lengths_extents_);
  }
  if (!from.keep_mask.is_none()) {
    const std::vector<std::int32_t> mask =
        take_integers(from.keep_mask, "keep_mask", keep_mask_rules, keep_mask_extents_);
    keep_mask_.assign(mask.size() + 1, 0);  // never without memory: a null pointer is no mask
    std::transform(mask.begin(), mask.end(), keep_mask_.begin(), [](std::int32_t keep) { return keep != 0; });
  }
  if (lengths_extents_.size() == 1) lengths_.resize(lengths_.size() + 1);
  if (head_lengths_extents_.size() == 2) head_lengths_.resize(head_lengths_.size() + 1);
}

layer_view<float> layer_input::widen(eigen_backend& backend) {
  layer_view<float> layer;
  if (needs_.key) key_rows_.read(backend, key_);
  layer.key = needs_.key ? key_rows_.view() : unread(key_);
  if (needs_.value) value_rows_.read(backend, value_);
  layer.value = needs_.value ? value_rows_.view() : unread(key_);
  if (needs_.query) {
    query_rows_.read(backend, query_);
    layer.query = query_rows_.view();
  } else {
    layer.query = {nullptr, {key_.extents[0], query_heads(), 0, head_dim()}};
  }
  if (!w_o_.missing()) {
    w_o_rows_.read(backend, w_o_);
    layer.projection = w_o_rows_.view();
  }
  if (needs_.metric) {
    check_metric();
    if (metric_ == nullptr) require(own_.metric.build(layer.projection, query_heads(), head_dim()));
    layer.metric = (metric_ != nullptr ? metric_ : &own_)->metric.view();
  }
  device_layer lengths;
  add_lengths(lengths);
  layer.lengths = lengths.lengths;
  layer.head_lengths = lengths.head_lengths;
  layer.keep_mask = lengths.keep_mask;
  layer.pad = lengths.pad;
  return layer;
}

device_layer layer_input::on_device() {
  const array_place at = place();
  device_layer layer;
  layer.key = tensor_of(key_);
  if (!value_.missing()) layer.value = tensor_of(value_);
  if (!query_.missing()) {
    layer.query = tensor_of(query_);
  } else {
    layer.query.extents = {key_.extents[0], query_heads(), 0, head_dim()};
  }
  if (needs_.metric || needs_.projection) {  // behind W_O, single deletions are measured by the metric
    check_metric();
    if (metric_ == nullptr) {
      own_ = make_metric(given_w_o_, query_heads(), std::nullopt);
      metric_ = &own_;
    }
    const metric_arrays& copy = metric_at(*metric_, at);
    const output_metric_view view = metric_->metric.view();
    layer.gram = tensor_of_part(at, copy.gram, view.gram);
    layer.factor = tensor_of_part(at, copy.factor, view.factor);
    layer.spectrum = tensor_of_part(at, copy.spectrum, view.spectrum);
  }
  if (needs_.projection) {
    array_rules rules = w_o_rules;
    rules.devices = true;
    projection_ = take_array(moved_to(at, given_w_o_, key_.object.attr("dtype")), "w_o", rules);
    layer.projection = tensor_of(projection_);
  }
  add_lengths(layer);
  return layer;
}

/// Of the queries, or of whom knows.
index_t layer_input::query_heads() const noexcept {
  if (!query_.missing()) return query_.extents[1];
  return metric_ != nullptr ? metric_->query_heads : key_.extents[1];
}

void layer_input::check_metric() const {
  if (metric_ == nullptr || (metric_->query_heads == query_heads() && metric_->head_dim == head_dim())) return;
  throw failure(errc::shape_mismatch,
                fmt::format("the metric is of {} query heads of {} channels, the layer has {} of {}",
                            metric_->query_heads, metric_->head_dim, query_heads(), head_dim()));
}

void layer_input::add_lengths(device_layer& layer) const {
  if (!lengths_.empty()) layer.lengths = {lengths_.data(), {lengths_extents_[0]}};
  if (!head_lengths_.empty()) {
    layer.head_lengths = {head_lengths_.data(), {head_lengths_extents_[0], head_lengths_extents_[1]}};
  }
  if (!keep_mask_.empty()) layer.keep_mask = {keep_mask_.data(), {keep_mask_extents_[0], keep_mask_extents_[1]}};
  layer.pad = pad_;
}

void add_metric(nb::module_& m) {
  nb::class_<metric_value>(m, "Metric", R"(What a layer's W_O does to distances, prepared once when a model is loaded.

It holds W_O, without a copy, and 12 head_dim^2 bytes a query head; of a W_O on a GPU a copy on the host, and once it
is used there, the same bytes on the GPU.)")
      .def("__init__",
           [](metric_value& self, nb::handle w_o, index_t query_heads, std::optional<int> threads) {
             new (&self) metric_value(make_metric(w_o, query_heads, threads));
           },
           nb::arg("w_o"), nb::arg("query_heads"), nb::arg("threads") = nb::none(),
           nb::sig("def __init__(self, w_o: Array, query_heads: int, threads: int | None = None) -> None"),
           R"(w_o: [hidden, query_heads * head_dim], the weight of the output projection as torch.nn.Linear has it; a
parameter is taken without its gradient.

Raises Error for a W_O that does not fit or is not finite. Cost: hidden * head_dim^2 multiply-adds and one
eigendecomposition [head_dim, head_dim] a head.)")
      .def_ro("query_heads", &metric_value::query_heads, "Query heads that W_O reads.")
      .def_ro("head_dim", &metric_value::head_dim, "Channels of a head.")
      .def("__repr__", [](const metric_value& metric) {
        return fmt::format("<restkv.Metric: {} query heads of {} channels>", metric.query_heads, metric.head_dim);
      });
}

}  // namespace restkv::python
