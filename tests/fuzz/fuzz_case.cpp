// SPDX-License-Identifier: Apache-2.0
// The restkv program's case reader: any configuration is either refused with a reason or read back as written, and any
// file is either refused with a reason or a layer that passes the library's own checks.
#include "command.hpp"
#include "configuration.hpp"
#include "layer_file.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <unistd.h>

namespace {

using namespace restkv;

void ensure(bool condition) {
  if (!condition) std::abort();
}

/// Runs `body`; false when it refused its input, which must come with a text.
template <class Body>
bool accepted(const Body& body) {
  try {
    body();
    return true;
  } catch (const cli::input_error& refusal) {
    ensure(refusal.what()[0] != '\0');
    return false;
  }
}

cli::configuration read_configuration(const std::string& text) {
  cli::configuration c;
  if (accepted([&] { c = cli::parse_configuration(text, "input"); })) {
    const nlohmann::json written = cli::to_json(c);
    ensure(cli::to_json(cli::parse_configuration(written.dump(), "written")) == written);
  }
  return c;
}

/// A file that is written again for every input.
class scratch_file {
 public:
  scratch_file() : path_((std::filesystem::temp_directory_path() / "restkv_case_XXXXXX").string()) {
    descriptor_ = mkstemp(path_.data());
    ensure(descriptor_ >= 0);
  }
  scratch_file(const scratch_file&) = delete;
  scratch_file& operator=(const scratch_file&) = delete;
  ~scratch_file() {
    close(descriptor_);
    std::remove(path_.c_str());
  }

  const std::string& holding(const std::uint8_t* data, std::size_t size) {
    ensure(ftruncate(descriptor_, 0) == 0);
    ensure(pwrite(descriptor_, data, size, 0) == static_cast<ssize_t>(size));
    return path_;
  }

 private:
  std::string path_;
  int descriptor_ = -1;
};

void read_file(const std::string& path) {
  safetensors_file file;
  if (!safetensors_file::open(path, file).ok()) return;
  const std::string* const text = file.find_metadata("case");
  const cli::configuration c = text == nullptr ? cli::configuration{} : read_configuration(*text);
  accepted([&] {
    cli::layer_file layer(file, path, "", c.seed % 2 == 0);
    // The metric takes heads * head_dim^3 steps and that much memory over head_dim.
    if (layer.query_heads() * layer.head_dim() * layer.head_dim() > 20000) return;
    const layer_view<float> view = layer.view(c);
    const status fits = check_layer(view, shape_of(view), std::min(c.window_of(view), layer.tokens()), c.observes(), true,
                                    c.measures_through_wo());
    ensure(fits.ok());
    ensure(layer.bytes_per_token() > 0 || layer.head_dim() == 0);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 0 && data[0] == '{') {
    read_configuration(std::string(reinterpret_cast<const char*>(data), size));
    return 0;
  }
  static scratch_file scratch;
  read_file(scratch.holding(data, size));
  return 0;
}
