// SPDX-License-Identifier: Apache-2.0
/// @file
/// `safetensors_writer`: collects tensors and writes them as one file.
#pragma once

#include <restkv/interop/replace_file.hpp>
#include <restkv/interop/safetensors.hpp>

#include <map>
#include <string_view>

namespace restkv {

/// Tensors and texts to be written. Elements are copied when they are added.
class safetensors_writer {
 public:
  /// Adds a tensor of any strides; it becomes row-major. One added under the same name before is replaced.
  template <class T, std::size_t Rank>
  void add(const std::string& name, const tensor_view<T, Rank>& view) {
    using value_type = std::remove_const_t<T>;
    std::vector<std::byte> bytes(view.empty() ? 0 : static_cast<std::size_t>(view.size()) * sizeof(value_type));
    std::array<index_t, Rank> index{};
    for (std::size_t done = 0; done < bytes.size(); done += sizeof(value_type)) {
      index_t offset = 0;
      for (std::size_t axis = 0; axis < Rank; ++axis) offset += index[axis] * view.strides[axis];
      std::memcpy(bytes.data() + done, view.data + offset, sizeof(value_type));
      for (std::size_t axis = Rank; axis-- > 0 && ++index[axis] == view.extents[axis];) index[axis] = 0;
    }
    add(name, detail::safetensors_dtype_of<value_type>(), {view.extents.begin(), view.extents.end()},
        std::move(bytes));
  }

  /// Adds a tensor from its bytes, row-major, as many as the shape and dtype need.
  void add(const std::string& name, safetensors_dtype dtype, std::vector<index_t> shape, std::vector<std::byte> bytes) {
    tensors_[name] = {dtype, std::move(shape), std::move(bytes)};
  }

  /// Adds a text under a key of `__metadata__`; one set under the same key before is replaced.
  void set_metadata(const std::string& key, std::string text) { metadata_[key] = std::move(text); }

  /// Fails (errc::invalid_argument) where a tensor's bytes are not as many as its shape and dtype need.
  [[nodiscard]] status check() const noexcept {
    for (const auto& [name, made] : tensors_) {
      const index_t needed = detail::safetensors_bytes(made.dtype, made.shape);
      if (needed >= 0 && static_cast<std::size_t>(needed) == made.bytes.size()) continue;
      return status::error(errc::invalid_argument,
                           "tensor %.80s of %zu axes has %zu bytes, its shape and dtype need %lld", name.c_str(),
                           made.shape.size(), made.bytes.size(), static_cast<long long>(needed));
    }
    return {};
  }

  /// The whole file in memory: tensors with wider elements first, so that each is aligned, then by name; a header
  /// padded with spaces to a multiple of 8 bytes. Names and texts must be UTF-8: throws nlohmann::json::type_error.
  [[nodiscard]] std::vector<std::byte> serialise() const {
    std::vector<decltype(tensors_)::const_iterator> order;
    for (auto at = tensors_.begin(); at != tensors_.end(); ++at) order.push_back(at);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      const std::size_t width_a = facts_of(a->second.dtype).bytes;
      const std::size_t width_b = facts_of(b->second.dtype).bytes;
      return width_a != width_b ? width_a > width_b : a->first < b->first;
    });
    // Not a JSON document: those allocate when they are destroyed, and end the program where that fails.
    std::map<std::string_view, std::string> members;
    if (!metadata_.empty()) {
      std::string& texts = members["__metadata__"];
      for (const auto& [key, text] : metadata_) {
        texts += (texts.empty() ? "{" : ",") + quoted(key) + ":" + quoted(text);
      }
      texts += "}";
    }
    std::size_t end = 0;
    for (const auto& at : order) {
      const std::size_t begin = end;
      end += at->second.bytes.size();
      std::string shape;
      for (const index_t extent : at->second.shape) shape += (shape.empty() ? "" : ",") + std::to_string(extent);
      members[at->first] = R"({"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) +
                           R"(],"dtype":")" + facts_of(at->second.dtype).name + R"(","shape":[)" + shape + "]}";
    }
    std::string text;
    for (const auto& [name, member] : members) {
      text += (text.empty() ? "{" : ",") + quoted(std::string(name)) + ":" + member;
    }
    text += text.empty() ? "{}" : "}";
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::vector<std::byte> file(8 + text.size() + end);
    const std::uint64_t header_bytes = text.size();
    std::memcpy(file.data(), &header_bytes, 8);
    std::memcpy(file.data() + 8, text.data(), text.size());
    std::byte* next = file.data() + 8 + text.size();
    for (const auto& at : order) next = std::copy(at->second.bytes.begin(), at->second.bytes.end(), next);
    return file;
  }

  /// Writes the file in one step: see `replace_file`. Errors are those of `check` and of `replace_file`.
  [[nodiscard]] status write(const std::string& path) const {
    RESTKV_RETURN_IF_FAILED(check());
    const std::vector<std::byte> file = serialise();
    const std::span<const std::byte> piece(file);
    return replace_file(path, std::span(&piece, 1));
  }

 private:
  /// A text as JSON has it.
  [[nodiscard]] static std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

  struct tensor {
    safetensors_dtype dtype = safetensors_dtype::f32;
    std::vector<index_t> shape;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace restkv
