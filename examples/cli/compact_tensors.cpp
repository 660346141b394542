// SPDX-License-Identifier: Apache-2.0
#include "compact_tensors.hpp"

#include "command.hpp"

#include <restkv/cache/compact.hpp>

#include <algorithm>
#include <cstring>
#include <vector>

namespace restkv::cli {

namespace {

template <element T>
void add_kept(safetensors_writer& out, const safetensors_file& file, const std::string& prefix, const char* name,
              const const_kept_tokens& kept, const tensor_view<const std::int64_t, 1>& offsets, bool dense,
              const std::string& where) {
  const safetensors_entry& entry = *file.find(prefix + name);
  const std::span<const std::byte> bytes = file.bytes(entry);
  std::vector<T> cache(bytes.size() / sizeof(T));  // a copy: the file need not align its tensors
  if (!bytes.empty()) std::memcpy(cache.data(), bytes.data(), bytes.size());
  const index_t channels = entry.shape[2];
  const tensor_view<const T, 4> source(cache.data(), {1, entry.shape[0], entry.shape[1], channels});
  std::vector<T> rows(static_cast<std::size_t>(kept.total() * channels));
  const ragged_layout<T> layout{{rows.data(), {kept.total(), channels}}, offsets, 1, kept.heads()};
  require(gather_tokens(kept, source, layout), where);
  if (dense) {
    const index_t slots = kept.heads() == 0 ? 0 : kept.total() / kept.heads();
    out.add(name, tensor_view<const T, 3>(rows.data(), {kept.heads(), slots, channels}));
  } else {
    out.add(name, tensor_view<const T, 2>(rows.data(), {kept.total(), channels}));
  }
}

}  // namespace

void add_compact_tensors(safetensors_writer& out, const safetensors_file& file, const std::string& prefix,
                         const const_kept_tokens& kept, const std::string& where) {
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(kept.heads() + 1));
  const tensor_view<std::int64_t, 1> offsets_view(offsets.data(), {kept.heads() + 1});
  require(ragged_offsets(kept, offsets_view), where);
  bool dense = true;
  for (index_t h = 1; h < kept.heads(); ++h) dense = dense && kept.lengths(0, h) == kept.lengths(0, 0);
  if (!dense) out.add("offsets", offsets_view);
  for (const char* name : {"k", "v"}) {
    const auto add = [&]<element T>(T) { add_kept<T>(out, file, prefix, name, kept, offsets_view, dense, where); };
    switch (file.find(prefix + name)->dtype) {
      case safetensors_dtype::f16: add(half{}); break;
      case safetensors_dtype::bf16: add(bfloat16{}); break;
      case safetensors_dtype::f32: add(float{}); break;
      case safetensors_dtype::f64: add(double{}); break;
      default: throw input_error(where + ": tensor " + prefix + name + " has no floating-point type");
    }
  }
}

}  // namespace restkv::cli
