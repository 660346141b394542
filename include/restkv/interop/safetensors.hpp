// SPDX-License-Identifier: Apache-2.0
/// @file
/// Reading safetensors files: `safetensors_view` over bytes in memory, `safetensors_file` for a file. Opt-in: needs
/// nlohmann/json.
///
/// The format: 8 bytes, little endian, the length N of the header; N bytes of JSON, `{"name": {"dtype": "F16", "shape":
/// [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"key": "text", ...}}`; then the tensors' bytes, row-major
/// and little endian, offsets counted from the end of the header. Everything is checked while opening, before any
/// tensor can be asked for: the tensors cover the data exactly, without holes or overlaps.
#pragma once

#include <restkv/interop/safetensors_header.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace restkv {

/// A parsed file in memory that somebody else owns.
class safetensors_view {
 public:
  safetensors_view() = default;

  /// Parses and checks `bytes`, a whole file. Never reads outside them. Nothing changes in `out` on failure.
  ///
  /// Errors (errc::bad_file), each naming the tensor: a file shorter than its header says; a header that is too long,
  /// not JSON, or of another form; an unknown dtype; an extent product that overflows; data_offsets that do not fit the
  /// shape, lie outside the file, overlap or leave a hole; a name that occurs twice.
  [[nodiscard]] static status parse(std::span<const std::byte> bytes, safetensors_view& out,
                                    const safetensors_limits& limits = {}) {
    if (bytes.size() < 8) {
      return status::error(errc::bad_file, "the file has %zu bytes, the length of the header alone takes 8",
                           bytes.size());
    }
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), 8);
    RESTKV_RETURN_IF_FAILED(detail::safetensors_header::check_length(header_bytes, bytes.size(), limits));
    const auto* const text = reinterpret_cast<const char*>(bytes.data()) + 8;
    const std::span<const std::byte> data = bytes.subspan(8 + static_cast<std::size_t>(header_bytes));
    detail::safetensors_header header;
    RESTKV_RETURN_IF_FAILED(header.read(text, text + header_bytes, data.size(), limits));
    out.assign(std::move(header), data);
    return {};
  }

  /// All tensors, by name.
  [[nodiscard]] const std::vector<safetensors_entry>& entries() const noexcept { return header_.entries; }
  /// Key and text, by key.
  [[nodiscard]] const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept {
    return header_.metadata;
  }

  /// Null when there is none of that name.
  [[nodiscard]] const safetensors_entry* find(std::string_view name) const noexcept {
    const auto at = std::lower_bound(header_.entries.begin(), header_.entries.end(), name,
                                     [](const safetensors_entry& e, std::string_view n) { return e.name < n; });
    return at != header_.entries.end() && at->name == name ? &*at : nullptr;
  }
  /// The text under a key of `__metadata__`, or null.
  [[nodiscard]] const std::string* find_metadata(std::string_view key) const noexcept {
    const auto at = std::lower_bound(header_.metadata.begin(), header_.metadata.end(), key,
                                     [](const auto& entry, std::string_view k) { return entry.first < k; });
    return at != header_.metadata.end() && at->first == key ? &at->second : nullptr;
  }

  /// The bytes of one of this file's entries.
  [[nodiscard]] std::span<const std::byte> bytes(const safetensors_entry& entry) const noexcept {
    return data_.subspan(entry.begin, entry.end - entry.begin);
  }

  /// The tensor itself, as it lies in the file. BOOL is viewed as std::uint8_t.
  ///
  /// Errors: no such tensor (errc::missing_input); another dtype or another number of axes (errc::shape_mismatch); bytes
  /// that are not aligned for T (errc::unsupported; `convert` reads those too).
  template <class T, std::size_t Rank>
  [[nodiscard]] status view(std::string_view name, tensor_view<const T, Rank>& out) const {
    const safetensors_entry* entry = nullptr;
    RESTKV_RETURN_IF_FAILED(find_of_rank(name, Rank, entry));
    const safetensors_dtype wanted = detail::safetensors_dtype_of<T>();
    const bool readable = entry->dtype == wanted ||
                          (wanted == safetensors_dtype::u8 && entry->dtype == safetensors_dtype::boolean);
    if (!readable) {
      return status::error(errc::shape_mismatch, "tensor %s is %s, %s is needed", detail::printable(name).c_str(),
                           facts_of(entry->dtype).name, facts_of(wanted).name);
    }
    const std::byte* const first = bytes(*entry).data();
    if (reinterpret_cast<std::uintptr_t>(first) % alignof(T) != 0) {
      return status::error(errc::unsupported, "tensor %s begins at byte %zu of the data, %s needs a multiple of %zu",
                           detail::printable(name).c_str(), entry->begin, facts_of(wanted).name, alignof(T));
    }
    out = {reinterpret_cast<const T*>(first), extents_of<Rank>(*entry)};
    return {};
  }

  /// A copy of the tensor with elements of type T, and a view of it: floating-point types (half and bfloat16 too) from
  /// any floating-point dtype, rounded to nearest; whole numbers from any whole-number dtype, BOOL included, where each
  /// value fits. `storage` owns the elements.
  ///
  /// Errors: as `view`; a whole number outside the range of T, named with its index.
  template <class T, std::size_t Rank>
  [[nodiscard]] status convert(std::string_view name, std::vector<T>& storage, tensor_view<T, Rank>& out) const {
    const safetensors_entry* entry = nullptr;
    RESTKV_RETURN_IF_FAILED(find_of_rank(name, Rank, entry));
    const std::span<const std::byte> source = bytes(*entry);
    std::vector<T> made(source.size() / facts_of(entry->dtype).bytes);
    const auto copy = [&]<class From>(From) -> status {
      for (std::size_t i = 0; i < made.size(); ++i) {
        From value;
        std::memcpy(&value, source.data() + i * sizeof(From), sizeof(From));
        if constexpr (element<T> && element<From>) {
          made[i] = narrow<T>(widen<double>(value));
        } else if constexpr (std::is_integral_v<T> && std::is_integral_v<From>) {
          if (!std::in_range<T>(value)) {
            return status::error(errc::invalid_argument, "tensor %s holds %lld at element %zu: too large for %zu bytes",
                                 detail::printable(name).c_str(), static_cast<long long>(value), i, sizeof(T));
          }
          made[i] = static_cast<T>(value);
        } else {
          return status::error(errc::shape_mismatch, "tensor %s is %s, a %s type is needed",
                               detail::printable(name).c_str(), facts_of(entry->dtype).name,
                               element<T> ? "floating-point" : "whole-number");
        }
      }
      return {};
    };
    switch (entry->dtype) {
      case safetensors_dtype::f16: RESTKV_RETURN_IF_FAILED(copy(half{})); break;
      case safetensors_dtype::bf16: RESTKV_RETURN_IF_FAILED(copy(bfloat16{})); break;
      case safetensors_dtype::f32: RESTKV_RETURN_IF_FAILED(copy(float{})); break;
      case safetensors_dtype::f64: RESTKV_RETURN_IF_FAILED(copy(double{})); break;
      case safetensors_dtype::i8: RESTKV_RETURN_IF_FAILED(copy(std::int8_t{})); break;
      case safetensors_dtype::i32: RESTKV_RETURN_IF_FAILED(copy(std::int32_t{})); break;
      case safetensors_dtype::i64: RESTKV_RETURN_IF_FAILED(copy(std::int64_t{})); break;
      case safetensors_dtype::u8:
      case safetensors_dtype::boolean: RESTKV_RETURN_IF_FAILED(copy(std::uint8_t{})); break;
    }
    storage = std::move(made);
    out = {storage.data(), extents_of<Rank>(*entry)};
    return {};
  }

 protected:
  /// Becomes what a checked header says, over the data behind it.
  void assign(detail::safetensors_header header, std::span<const std::byte> data) noexcept {
    header_ = std::move(header);
    data_ = data;
  }

 private:
  [[nodiscard]] status find_of_rank(std::string_view name, std::size_t rank, const safetensors_entry*& out) const {
    out = find(name);
    if (out == nullptr) {
      return status::error(errc::missing_input, "the file has no tensor %s among its %zu",
                           detail::printable(name).c_str(), header_.entries.size());
    }
    if (out->shape.size() != rank) {
      return status::error(errc::shape_mismatch, "tensor %s has %zu axes, %zu are needed",
                           detail::printable(name).c_str(), out->shape.size(), rank);
    }
    return {};
  }

  template <std::size_t Rank>
  [[nodiscard]] static std::array<index_t, Rank> extents_of(const safetensors_entry& entry) noexcept {
    std::array<index_t, Rank> extents{};
    std::copy(entry.shape.begin(), entry.shape.end(), extents.begin());
    return extents;
  }

  detail::safetensors_header header_;
  std::span<const std::byte> data_;
};

namespace detail {

/// The next `left` bytes of a file, a piece at a time.
struct file_text {
  std::FILE* file;
  std::uint64_t left;
  std::array<char, 4096> piece{};
  std::size_t at = 0;
  std::size_t size = 0;

  file_text(std::FILE* source, std::uint64_t bytes) : file(source), left(bytes) { refill(); }
  [[nodiscard]] bool ended() const noexcept { return at == size; }
  void advance() noexcept {
    if (++at == size) refill();
  }

 private:
  void refill() noexcept {
    at = 0;
    size = std::fread(piece.data(), 1, static_cast<std::size_t>(std::min<std::uint64_t>(left, piece.size())), file);
    left -= size;
  }
};

/// The characters of a file_text, which it refers to; without one, their end.
class file_characters {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = char;

  explicit file_characters(file_text* text = nullptr) noexcept : text_(text) {}
  [[nodiscard]] char operator*() const noexcept { return text_->piece[text_->at]; }
  file_characters& operator++() noexcept {
    text_->advance();
    return *this;
  }
  file_characters operator++(int) = delete;
  [[nodiscard]] bool operator==(const file_characters& other) const noexcept { return at_end() == other.at_end(); }

 private:
  [[nodiscard]] bool at_end() const noexcept { return text_ == nullptr || text_->ended(); }

  file_text* text_;
};

}  // namespace detail

/// A file, read whole. Owns its bytes; views of its tensors are valid as long as it lives. Movable.
class safetensors_file : public safetensors_view {
 public:
  safetensors_file() = default;

  /// Reads and checks a file. Nothing changes in `out` on failure. The data begins at a multiple of 64 bytes in memory.
  /// The header is checked against the size of the file before memory is taken for the data: until then a few times
  /// what the header says is all that is taken.
  ///
  /// Errors, beginning with the path: a file that cannot be read, and those of `parse` (errc::bad_file); no memory for
  /// the data (errc::out_of_memory).
  [[nodiscard]] static status open(const std::string& path, safetensors_file& out,
                                   const safetensors_limits& limits = {}) {
    const auto bad = [&](const char* what) {
      return status::error(errc::bad_file, "%s: %s", path.c_str(), what);
    };
    struct closer {
      void operator()(std::FILE* file) const noexcept { std::fclose(file); }
    };
    std::error_code trouble;
    const std::filesystem::file_status kind = std::filesystem::status(path, trouble);
    if (trouble && !std::filesystem::exists(kind)) return bad(trouble.message().c_str());
    if (!std::filesystem::is_regular_file(kind)) return bad("is not a plain file");
    errno = 0;
    const std::unique_ptr<std::FILE, closer> file(std::fopen(path.c_str(), "rb"));
    if (file == nullptr) return bad(std::strerror(errno));
    const std::uintmax_t size = std::filesystem::file_size(path, trouble);
    if (trouble) return bad(trouble.message().c_str());
    std::uint64_t header_bytes = 0;
    if (size < 8) {
      return status::error(errc::bad_file, "%s: the file has %llu bytes, the length of the header alone takes 8",
                           path.c_str(), static_cast<unsigned long long>(size));
    }
    if (std::fread(&header_bytes, 1, 8, file.get()) != 8) return bad("cannot be read");
    detail::safetensors_header header;
    status outcome = detail::safetensors_header::check_length(header_bytes, size, limits);
    if (outcome.ok()) {
      detail::file_text text(file.get(), header_bytes);
      outcome = header.read(detail::file_characters(&text), detail::file_characters(), size - 8 - header_bytes, limits);
    }
    if (!outcome.ok()) return status::error(outcome.code(), "%s: %.380s", path.c_str(), outcome.message());
    const auto bytes = static_cast<std::size_t>(size - 8 - header_bytes);
    std::unique_ptr<std::byte[], release> memory(
        static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{alignment}, std::nothrow)));
    if (memory == nullptr) {
      return status::error(errc::out_of_memory, "%s: there is no memory for the %zu bytes of its tensors", path.c_str(),
                           bytes);
    }
    if (std::fread(memory.get(), 1, bytes, file.get()) != bytes) return bad("cannot be read");
    out.assign(std::move(header), {memory.get(), bytes});
    out.memory_ = std::move(memory);
    return {};
  }

  safetensors_file(const safetensors_file&) = delete;
  safetensors_file& operator=(const safetensors_file&) = delete;
  ///@{
  /// Views of the tensors stay valid: the bytes move with their owner.
  safetensors_file(safetensors_file&&) = default;
  safetensors_file& operator=(safetensors_file&&) = default;
  ///@}
  ~safetensors_file() = default;

 private:
  static constexpr std::size_t alignment = 64;
  struct release {
    void operator()(std::byte* bytes) const noexcept { ::operator delete[](bytes, std::align_val_t{alignment}); }
  };

  std::unique_ptr<std::byte[], release> memory_;
};

}  // namespace restkv
