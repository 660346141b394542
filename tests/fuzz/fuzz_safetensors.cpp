// SPDX-License-Identifier: Apache-2.0
// Any bytes are either refused with a reason or a file whose every tensor can be viewed and converted, and that is
// written back as an equal file.
#include <restkv/interop/safetensors_writer.hpp>

#include <cstdlib>

namespace {

using restkv::errc;
using restkv::safetensors_dtype;
using restkv::safetensors_entry;
using restkv::safetensors_view;
using restkv::status;

void require(bool condition) {
  if (!condition) std::abort();
}

/// A failure says why, a success says nothing.
void check_status(const status& outcome) { require(outcome.ok() == (outcome.message()[0] == '\0')); }

volatile unsigned char sink;

template <class T, std::size_t Rank>
void read_as(const safetensors_view& file, const safetensors_entry& entry) {
  restkv::tensor_view<const T, Rank> view;
  const status viewed = file.view<T>(entry.name, view);
  check_status(viewed);
  std::vector<T> storage;
  restkv::tensor_view<T, Rank> copy;
  const status converted = file.convert<T>(entry.name, storage, copy);
  check_status(converted);
  if (entry.shape.size() != Rank) {
    require(viewed.code() == errc::shape_mismatch && converted.code() == errc::shape_mismatch);
    return;
  }
  if (viewed.ok()) {
    require(view.dense() || view.size() == 0);
    require(static_cast<std::size_t>(view.size()) * sizeof(T) == file.bytes(entry).size());
    const auto* const bytes = reinterpret_cast<const unsigned char*>(view.data);
    for (std::size_t i = 0; i < file.bytes(entry).size(); ++i) sink = bytes[i];
    require(converted.ok());
  }
  if (converted.ok()) {
    require(copy.size() == static_cast<restkv::index_t>(storage.size()));
    for (std::size_t axis = 0; axis < Rank; ++axis) require(copy.extent(axis) == entry.shape[axis]);
  }
}

template <std::size_t Rank>
void read_all_types(const safetensors_view& file, const safetensors_entry& entry) {
  read_as<restkv::half, Rank>(file, entry);
  read_as<float, Rank>(file, entry);
  read_as<double, Rank>(file, entry);
  read_as<std::int8_t, Rank>(file, entry);
  read_as<std::int64_t, Rank>(file, entry);
  read_as<std::uint8_t, Rank>(file, entry);
}

void write_back(const safetensors_view& file) {
  restkv::safetensors_writer writer;
  for (const safetensors_entry& entry : file.entries()) {
    const auto bytes = file.bytes(entry);
    writer.add(entry.name, entry.dtype, entry.shape, {bytes.begin(), bytes.end()});
  }
  for (const auto& [key, text] : file.metadata()) writer.set_metadata(key, text);
  const std::vector<std::byte> bytes = writer.serialise();
  safetensors_view again;
  require(safetensors_view::parse(bytes, again).ok());
  require(again.metadata() == file.metadata());
  require(again.entries().size() == file.entries().size());
  for (const safetensors_entry& entry : file.entries()) {
    const safetensors_entry* const same = again.find(entry.name);
    require(same != nullptr && same->dtype == entry.dtype && same->shape == entry.shape);
    const auto old_bytes = file.bytes(entry);
    const auto new_bytes = again.bytes(*same);
    require(std::equal(old_bytes.begin(), old_bytes.end(), new_bytes.begin(), new_bytes.end()));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  safetensors_view file;
  const status parsed = safetensors_view::parse(bytes, file);
  check_status(parsed);
  if (!parsed.ok()) {
    require(parsed.code() == errc::bad_file && file.entries().empty());
    return 0;
  }
  std::size_t covered = 0;
  for (const safetensors_entry& entry : file.entries()) {
    covered += file.bytes(entry).size();
    require(file.find(entry.name) == &entry);
    require(!entry.description().empty());
    switch (entry.shape.size()) {
      case 2: read_all_types<2>(file, entry); break;
      case 3: read_all_types<3>(file, entry); break;
      default: read_all_types<1>(file, entry); break;
    }
  }
  std::uint64_t header = 0;
  std::memcpy(&header, data, sizeof header);
  require(8 + header + covered == size);
  for (const auto& [key, text] : file.metadata()) require(file.find_metadata(key) != nullptr);
  write_back(file);
  return 0;
}
