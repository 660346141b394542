// SPDX-License-Identifier: Apache-2.0
// The restkv program's readers of cases and traces: any configuration is either refused with a reason or read back as
// written, and any file is either refused with a reason or holds layers that pass the library's own checks.
#include "command.hpp"
#include "configuration.hpp"
#include "fuzz/scratch_file.hpp"
#include "layer_file.hpp"
#include "trace_file.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace {

using namespace restkv;
using restkv_test::require;

/// Runs `body`; false when it refused its input, which must come with a text.
template <class Body>
bool accepted(const Body& body) {
  try {
    body();
    return true;
  } catch (const cli::input_error& refusal) {
    require(refusal.what()[0] != '\0');
    return false;
  }
}

cli::configuration read_configuration(const std::string& text) {
  cli::configuration c;
  if (accepted([&] { c = cli::parse_configuration(text, "input"); })) {
    const nlohmann::json written = cli::to_json(c);
    require(cli::to_json(cli::parse_configuration(written.dump(), "written")) == written);
  }
  return c;
}

void read_case(const std::string& path, const safetensors_file& file) {
  const std::string* const text = file.find_metadata("case");
  const cli::configuration c = text == nullptr ? cli::configuration{} : read_configuration(*text);
  accepted([&] {
    cli::layer_file layer(file, path, "", c.seed % 2 == 0);
    // The metric takes heads * head_dim^3 steps and that much memory over head_dim.
    if (layer.query_heads() * layer.head_dim() * layer.head_dim() > 20000) return;
    const layer_view<float> view = layer.view(c);
    const status fits = check_layer(view, shape_of(view), std::min(c.window_of(view), layer.tokens()), c.observes(),
                                    true, c.measures_through_wo());
    require(fits.ok());
    require(layer.bytes_per_token() > 0 || layer.head_dim() == 0);
  });
}

void read_trace(const std::string& path) {
  accepted([&] {
    const cli::trace_file trace(path, {});
    require(!trace.layers().empty());
    for (const cli::trace_layer& layer : trace.layers()) {
      const layer_view<float> prompt = layer.prompt();
      require(check_layer(prompt, shape_of(prompt), prompt.query.extent(2), true, true, true).ok());
      require(check_projection(prompt, shape_of(prompt)).ok());
      require(layer.future().key.extent(2) == trace.future());
    }
  });
}

void read_file(const std::string& path) {
  safetensors_file file;
  if (!safetensors_file::open(path, file).ok()) return;
  const bool is_trace = std::any_of(file.entries().begin(), file.entries().end(),
                                    [](const auto& entry) { return entry.name.starts_with("layers."); });
  if (!is_trace) return read_case(path, file);
  const bool is_small = std::none_of(file.entries().begin(), file.entries().end(), [](const auto& entry) {
    return std::any_of(entry.shape.begin(), entry.shape.end(), [](index_t extent) { return extent > 64; });
  });
  if (is_small) read_trace(path);  // the metric, as above
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 0 && data[0] == '{') {
    read_configuration(std::string(reinterpret_cast<const char*>(data), size));
    return 0;
  }
  static restkv_test::scratch_file scratch;
  read_file(scratch.holding(data, size));
  return 0;
}
