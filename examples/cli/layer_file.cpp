// SPDX-License-Identifier: Apache-2.0
#include "layer_file.hpp"

#include "command.hpp"

#include <fmt/format.h>

#include <cmath>

namespace restkv::cli {

template <std::size_t Rank>
void layer_file::read(std::string_view name, float_tensor<Rank>& out, bool allow_non_finite) {
  const std::string full = prefix_ + std::string(name);
  require(file_.convert(full, out.elements, out.view), path_);
  index_t first = -1;
  index_t count = 0;
  for (index_t i = 0; i < out.view.size(); ++i) {
    if (std::isfinite(out.elements[static_cast<std::size_t>(i)])) continue;
    if (count++ == 0) first = i;
  }
  if (count > 0 && !allow_non_finite) {
    std::string place;
    index_t rest = first;
    for (std::size_t axis = Rank; axis-- > 0;) {
      place = std::to_string(rest % out.view.extent(axis)) + (place.empty() ? "" : ", ") + place;
      rest /= out.view.extent(axis);
    }
    throw input_error(
        fmt::format("{}: tensor {} holds {} at [{}]; {} of its {} elements are not finite "
                    "(--allow-non-finite goes on)",
                    path_, full, out.elements[static_cast<std::size_t>(first)], place, count, out.view.size()));
  }
  // An empty tensor is there, too: give it an address.
  if (out.view.data == nullptr) {
    out.elements.reserve(1);
    out.view.data = out.elements.data();
  }
}

layer_file::layer_file(const safetensors_file& file, std::string path, std::string prefix, bool allow_non_finite)
    : file_(file), path_(std::move(path)), prefix_(std::move(prefix)) {
  read("k", key_, allow_non_finite);
  read("v", value_, allow_non_finite);
  const auto fit = [&](const char* tensor, index_t has, const char* what, const std::string& other, index_t needed) {
    if (has != needed) {
      throw input_error(
          fmt::format("{}: tensor {}{} has {} {}, {} {}", path_, prefix_, tensor, has, what, other, needed));
    }
  };
  fit("v", value_.view.extent(0), "heads", "k has", kv_heads());
  fit("v", value_.view.extent(1), "tokens", "k has", tokens());
  fit("v", value_.view.extent(2), "channels", "k has", head_dim());
  query_heads_ = kv_heads();
  if (has("q")) {
    read("q", query_, allow_non_finite);
    query_heads_ = query_.view.extent(0);
    fit("q", query_.view.extent(2), "channels", "k has", head_dim());
    if (query_.view.extent(1) > tokens()) {
      throw input_error(fmt::format("{}: tensor {}q has {} queries, k has {} tokens: q holds the last queries of them",
                                    path_, prefix_, query_.view.extent(1), tokens()));
    }
  }
  if (kv_heads() < 1 || query_heads_ < 1 || query_heads_ % kv_heads() != 0) {
    throw input_error(fmt::format("{}: tensor {}q has {} heads, k has {}: query heads must be a multiple of KV heads",
                                  path_, prefix_, query_heads_, kv_heads()));
  }
  // An empty tensor costs a file nothing, whatever its other extents say.
  const auto limit = [&](const char* tensor, index_t extent, const char* what, index_t most) {
    if (extent < 1 || extent > most) {
      throw input_error(fmt::format("{}: tensor {}{} has {} {}, must be within [1, {}]", path_, prefix_, tensor, extent,
                                    what, most));
    }
  };
  limit("k", head_dim(), "channels", 4096);
  limit(has("q") ? "q" : "k", query_heads_, "heads", 65536);
  if (has("wo")) {
    read("wo", projection_, allow_non_finite);
    if (projection_.view.extent(0) < 1) throw input_error(fmt::format("{}: tensor {}wo has no rows", path_, prefix_));
    fit("wo", projection_.view.extent(1), "columns",
        fmt::format("{} query heads of {} channels need", query_heads_, head_dim()), query_heads_ * head_dim());
  }
}

void layer_file::check_inputs(const configuration& c) const {
  const auto need = [&](bool there, const char* tensor, const char* why) {
    if (!there) throw input_error(fmt::format("{}: there is no tensor {}{}: {}", path_, prefix_, tensor, why));
  };
  if (c.reads_queries()) need(has("q"), "q", "the method looks at queries");
  if (c.measures_through_wo()) need(has("wo"), "wo", "distances are measured through W_O (see --no-wo)");
  if (c.needs_wo()) need(has("wo"), "wo", "values are measured behind W_O");
  if (!c.reads_queries()) return;
  const index_t needed = !c.observes() || c.observes_every_query() ? 1 : c.window;
  if (query_.view.extent(1) < std::min(needed, tokens())) {
    throw input_error(fmt::format("{}: tensor {}q has {} queries, the observation window needs {}", path_, prefix_,
                                  query_.view.extent(1), std::min(needed, tokens())));
  }
}

layer_view<float> layer_file::view(const configuration& c) {
  check_inputs(c);
  const index_t tokens = this->tokens();
  layer_view<float> layer;
  layer.key = tensor_view<const float, 4>(key_.view.data, {1, kv_heads(), tokens, head_dim()});
  layer.value = tensor_view<const float, 4>(value_.view.data, {1, kv_heads(), tokens, head_dim()});
  layer.query = {query_.view.data, {1, query_heads_, query_.view.extent(1), head_dim()}};
  layer.projection = projection_.view;
  if (c.measures_through_wo()) {
    if (!metric_built_) require(metric_.build(layer.projection, query_heads_, head_dim()), path_);
    metric_built_ = true;
    layer.metric = metric_.view();
  }
  return layer;
}

std::size_t layer_file::bytes_per_token() const noexcept {
  const auto element_bytes = [&](const char* name) { return facts_of(file_.find(prefix_ + name)->dtype).bytes; };
  return static_cast<std::size_t>(head_dim()) * (element_bytes("k") + element_bytes("v"));
}

std::vector<std::int32_t> layer_file::whole_numbers(const std::string& name, index_t rows, index_t columns) const {
  std::vector<std::int32_t> elements;
  tensor_view<std::int32_t, 2> view;
  require(file_.convert(name, elements, view), path_);
  if (view.extent(0) != rows || view.extent(1) != columns) {
    throw input_error(fmt::format("{}: tensor {} is [{}, {}], the layer needs [{}, {}]", path_, name, view.extent(0),
                                  view.extent(1), rows, columns));
  }
  return elements;
}

}  // namespace restkv::cli
