// SPDX-License-Identifier: Apache-2.0
#include "trace_file.hpp"

#include "command.hpp"

#include <restkv/interop/safetensors.hpp>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

namespace restkv::cli {
namespace {

constexpr std::string_view layer_prefix = "layers.";

/// The layers that have a tensor `layers.<index>.q`, ascending.
std::vector<index_t> stored_layers(const safetensors_view& file) {
  std::vector<index_t> found;
  for (const safetensors_entry& entry : file.entries()) {
    if (!entry.name.starts_with(layer_prefix)) continue;
    const char* const first = entry.name.data() + layer_prefix.size();
    const char* const last = entry.name.data() + entry.name.size();
    index_t index = 0;
    const auto [end, failure] = std::from_chars(first, last, index);
    if (failure == std::errc() && index >= 0 && std::string_view(end, last) == ".q") found.push_back(index);
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// Reads the tensors of a file and holds them to each other. Every failure names the file and the tensor.
class trace_reader {
 public:
  trace_reader(const std::string& path, const safetensors_view& file) : path_(path), file_(file) {}

  /// A tensor [heads, tokens, head_dim] as [1, heads, tokens, head_dim].
  void read(const std::string& name, trace_tensor& out) const {
    tensor_view<float, 3> view;
    require(file_.convert(name, out.elements, view), path_);
    check_finite(name, out.elements, view);
    out.view = {out.elements.data(), {1, view.extent(0), view.extent(1), view.extent(2)}};
  }

  void read(const std::string& name, std::vector<float>& elements, tensor_view<const float, 2>& out) const {
    tensor_view<float, 2> view;
    require(file_.convert(name, elements, view), path_);
    check_finite(name, elements, view);
    out = view;
  }

  /// `has` is the extent of an axis of tensor `name`, `want` what something else asks of it.
  void expect(const std::string& name, const char* axis, index_t has, index_t want, const std::string& owner) const {
    if (has == want) return;
    throw input_error(fmt::format("{}: tensor {} has {} {}, {} has {}", path_, name, has, axis, owner, want));
  }

  void expect_some(const std::string& name, const tensor_view<const float, 4>& view) const {
    for (const auto& [axis, what] : {std::pair{1u, "heads"}, std::pair{2u, "tokens"}, std::pair{3u, "channels"}}) {
      if (view.extent(axis) > 0) continue;
      throw input_error(
          fmt::format("{}: tensor {} has {} {}, at least 1 is needed", path_, name, view.extent(axis), what));
    }
  }

  [[noreturn]] void fail(const std::string& message) const { throw input_error(path_ + ": " + message); }

 private:
  template <std::size_t Rank>
  void check_finite(const std::string& name, const std::vector<float>& elements,
                    const tensor_view<float, Rank>& view) const {
    const auto at = std::find_if(elements.begin(), elements.end(), [](float x) { return !std::isfinite(x); });
    if (at == elements.end()) return;
    std::array<index_t, Rank> index{};
    index_t rest = at - elements.begin();
    for (std::size_t axis = Rank; axis-- > 0;) {
      index[axis] = rest % view.extent(axis);
      rest /= view.extent(axis);
    }
    throw input_error(fmt::format("{}: tensor {} holds {} at [{}]: every element must be finite", path_, name, *at,
                                  fmt::join(index, ", ")));
  }

  const std::string& path_;
  const safetensors_view& file_;
};

/// Reads and checks one layer; its own tensors must fit each other.
void read_layer(const trace_reader& reader, trace_layer& layer) {
  const std::string prefix = fmt::format("{}{}.", layer_prefix, layer.index);
  const std::string q = prefix + "q";
  const std::string k = prefix + "k";
  const std::string q_future = prefix + "q_future";
  reader.read(q, layer.query);
  reader.read(k, layer.key);
  reader.expect_some(q, layer.query.view);
  reader.expect_some(k, layer.key.view);
  const index_t query_heads = layer.query.view.extent(1);
  const index_t kv_heads = layer.key.view.extent(1);
  const index_t head_dim = layer.query.view.extent(3);
  constexpr index_t most_channels = 1024;  // far above what models have; the metric of W_O takes its cube
  if (head_dim > most_channels) {
    reader.fail(fmt::format("tensor {} has {} channels, at most {} are read", q, head_dim, most_channels));
  }
  if (query_heads % kv_heads != 0) {
    reader.fail(fmt::format("tensor {} has {} heads, {} has {}: a multiple is needed", q, query_heads, k, kv_heads));
  }
  reader.expect(k, "channels", layer.key.view.extent(3), head_dim, q);
  if (layer.query.view.extent(2) > layer.key.view.extent(2)) {
    reader.fail(fmt::format("tensor {} has {} tokens, {} has {}: there cannot be more queries than keys", q,
                            layer.query.view.extent(2), k, layer.key.view.extent(2)));
  }

  reader.read(q_future, layer.query_future);
  reader.expect_some(q_future, layer.query_future.view);
  reader.expect(q_future, "heads", layer.query_future.view.extent(1), query_heads, q);
  reader.expect(q_future, "channels", layer.query_future.view.extent(3), head_dim, q);

  const auto read_cache = [&](const char* name, trace_tensor& out, index_t tokens, const std::string& owner) {
    reader.read(prefix + name, out);
    reader.expect(prefix + name, "heads", out.view.extent(1), kv_heads, k);
    reader.expect(prefix + name, "tokens", out.view.extent(2), tokens, owner);
    reader.expect(prefix + name, "channels", out.view.extent(3), head_dim, q);
  };
  read_cache("v", layer.value, layer.key.view.extent(2), k);
  read_cache("k_future", layer.key_future, layer.query_future.view.extent(2), q_future);
  read_cache("v_future", layer.value_future, layer.query_future.view.extent(2), q_future);

  reader.read(prefix + "wo", layer.projection_elements, layer.projection);
  if (layer.projection.extent(0) < 1) reader.fail(fmt::format("tensor {}wo has 0 rows, at least 1 is needed", prefix));
  if (layer.projection.extent(1) != query_heads * head_dim) {
    reader.fail(fmt::format("tensor {}wo has {} columns, {} query heads of {} channels need {}", prefix,
                            layer.projection.extent(1), query_heads, head_dim, query_heads * head_dim));
  }
}

}  // namespace

layer_view<float> trace_layer::prompt() const {
  return {.query = query.view, .key = key.view, .value = value.view, .projection = projection, .metric = metric.view()};
}

trace_file::trace_file(const std::string& path, const std::vector<index_t>& wanted) {
  safetensors_file file;
  require(safetensors_file::open(path, file), {});  // its messages begin with the path
  const trace_reader reader(path, file);
  const std::vector<index_t> stored = stored_layers(file);
  if (stored.empty()) {
    reader.fail(fmt::format("not a trace: none of its {} tensors is named layers.<number>.q", file.entries().size()));
  }
  for (const index_t index : wanted) {
    if (!std::binary_search(stored.begin(), stored.end(), index)) {
      reader.fail(fmt::format("layer {} is not stored; there are {}", index, fmt::join(stored, ", ")));
    }
  }
  for (const index_t index : stored) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), index) == wanted.end()) continue;
    trace_layer& layer = layers_.emplace_back();
    layer.index = index;
    read_layer(reader, layer);
    // One budget is one size of cache for all layers, so all must be of one shape.
    const trace_layer& first = layers_.front();
    const auto expect_as_first = [&](const char* name, const char* axis, index_t has, index_t want) {
      reader.expect(fmt::format("{}{}.{}", layer_prefix, index, name), axis, has, want,
                    fmt::format("{}{}.{}", layer_prefix, first.index, name));
    };
    expect_as_first("q", "heads", layer.query.view.extent(1), first.query.view.extent(1));
    expect_as_first("q", "channels", layer.query.view.extent(3), first.query.view.extent(3));
    expect_as_first("k", "heads", layer.key.view.extent(1), first.key.view.extent(1));
    expect_as_first("k", "tokens", layer.key.view.extent(2), first.key.view.extent(2));
    expect_as_first("q_future", "tokens", layer.query_future.view.extent(2), first.query_future.view.extent(2));
    require(layer.metric.build(layer.projection, layer.query.view.extent(1), layer.query.view.extent(3)), path);
  }
  shape_ = shape_of(layers_.front().prompt());
  future_ = layers_.front().query_future.view.extent(2);
  metadata_ = file.metadata();
}

}  // namespace restkv::cli
