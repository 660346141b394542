// SPDX-License-Identifier: Apache-2.0
/// @file
/// The header of a safetensors file: its element types and entries, and how it is read and checked before a byte of the
/// data is. Opt-in: needs nlohmann/json.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace restkv {

static_assert(std::endian::native == std::endian::little, "safetensors are little endian and are not swapped here");

/// Element types of the format that this library reads and writes.
enum class safetensors_dtype { f16, bf16, f32, f64, i8, i32, i64, u8, boolean };

/// The name in a file, "F16", and bytes of one element.
struct safetensors_dtype_facts {
  safetensors_dtype dtype;  ///< the element type
  const char* name;         ///< as files spell it
  std::size_t bytes;        ///< of one element
};
/// All of them, in the order of `safetensors_dtype`.
inline constexpr safetensors_dtype_facts safetensors_dtypes[] = {
    {safetensors_dtype::f16, "F16", 2}, {safetensors_dtype::bf16, "BF16", 2}, {safetensors_dtype::f32, "F32", 4},
    {safetensors_dtype::f64, "F64", 8}, {safetensors_dtype::i8, "I8", 1},     {safetensors_dtype::i32, "I32", 4},
    {safetensors_dtype::i64, "I64", 8}, {safetensors_dtype::u8, "U8", 1},     {safetensors_dtype::boolean, "BOOL", 1}};

/// Name and size of an element type.
[[nodiscard]] constexpr const safetensors_dtype_facts& facts_of(safetensors_dtype dtype) noexcept {
  return safetensors_dtypes[static_cast<std::size_t>(dtype)];
}

namespace detail {

template <class T>
inline constexpr bool no_safetensors_dtype = false;

/// The dtype whose elements are T. BOOL is read and written as std::uint8_t through `safetensors_dtype::boolean`.
template <class T>
[[nodiscard]] constexpr safetensors_dtype safetensors_dtype_of() noexcept {
  if constexpr (std::is_same_v<T, half>)
    return safetensors_dtype::f16;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return safetensors_dtype::bf16;
  else if constexpr (std::is_same_v<T, float>)
    return safetensors_dtype::f32;
  else if constexpr (std::is_same_v<T, double>)
    return safetensors_dtype::f64;
  else if constexpr (std::is_same_v<T, std::int8_t>)
    return safetensors_dtype::i8;
  else if constexpr (std::is_same_v<T, std::int32_t>)
    return safetensors_dtype::i32;
  else if constexpr (std::is_same_v<T, std::int64_t>)
    return safetensors_dtype::i64;
  else if constexpr (std::is_same_v<T, std::uint8_t>)
    return safetensors_dtype::u8;
  else
    static_assert(no_safetensors_dtype<T>, "safetensors have no such element type here");
}

/// A name from a file, fit for a message: control characters replaced, cut to 80 bytes.
[[nodiscard]] inline std::string printable(std::string_view name) {
  std::string text(name.substr(0, 80));
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  if (name.size() > 80) text += "...";
  return text;
}

}  // namespace detail

/// One tensor of a file, checked.
struct safetensors_entry {
  std::string name;                                  ///< unique in its file
  safetensors_dtype dtype = safetensors_dtype::f32;  ///< of the elements
  std::vector<index_t> shape;                        ///< row-major extents
  std::size_t begin = 0;                             ///< first byte, from the end of the header
  std::size_t end = 0;                               ///< one behind the last byte

  /// "F16 [2, 160, 16]"
  [[nodiscard]] std::string description() const {
    std::string text = std::string(facts_of(dtype).name) + " [";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
    }
    return text + "]";
  }
};

/// Limits on a header, far above what models need.
struct safetensors_limits {
  std::size_t header_bytes = 100'000'000;  ///< the limit of the format's own implementation
  std::size_t rank = 8;                    ///< axes of one tensor
};

namespace detail {

/// Takes the header's JSON event by event, so that its depth, its kinds and repeated names are checked without ever
/// building a document.
class safetensors_header_reader {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  explicit safetensors_header_reader(const safetensors_limits& limits) : limits_(limits) {}

  status failure;
  std::vector<safetensors_entry> entries;
  std::vector<std::pair<std::string, std::string>> metadata;

  bool null() { return unexpected("null"); }
  bool boolean(bool) { return unexpected("a truth value"); }
  bool number_integer(number_integer_t value) {
    return fail("the header has a negative number, %lld, in %s", static_cast<long long>(value), where().c_str());
  }
  bool number_float(number_float_t, const string_t& text) {
    return fail("the header has the number %s in %s: a whole number is needed", printable(text).c_str(),
                where().c_str());
  }
  bool binary(binary_t&) { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) {
    if (place_ == place::shape) {
      if (value > static_cast<number_unsigned_t>(std::numeric_limits<index_t>::max())) {
        return fail("tensor %s has an extent of %llu, at most 2^63 - 1 is possible", name().c_str(),
                    static_cast<unsigned long long>(value));
      }
      if (entries.back().shape.size() == limits_.rank) {
        return fail("tensor %s has more than %zu axes", name().c_str(), limits_.rank);
      }
      entries.back().shape.push_back(static_cast<index_t>(value));
      return true;
    }
    if (place_ == place::offsets) {
      if (offsets_ == 2) return fail("tensor %s has more than 2 data_offsets", name().c_str());
      (offsets_++ == 0 ? entries.back().begin : entries.back().end) = static_cast<std::size_t>(value);
      return true;
    }
    return unexpected("a number");
  }

  bool string(string_t& value) {
    if (place_ == place::metadata) {
      metadata.back().second = std::move(value);
      return true;
    }
    if (place_ != place::tensor || field_ != field::dtype) return unexpected("a text");
    for (const auto& facts : safetensors_dtypes) {
      if (value == facts.name) {
        entries.back().dtype = facts.dtype;
        return true;
      }
    }
    return fail("tensor %s has dtype %s; known: BOOL U8 I8 I32 I64 F16 BF16 F32 F64", name().c_str(),
                printable(value).c_str());
  }

  bool start_object(std::size_t) {
    switch (place_) {
      case place::outside:
        place_ = place::file;
        return true;
      case place::metadata_value:
        place_ = place::metadata;
        return true;
      case place::tensor_value:
        place_ = place::tensor;
        seen_ = 0;
        return true;
      default:
        return unexpected("an object");
    }
  }

  bool end_object() {
    if (place_ == place::tensor) {
      for (const auto& [bit, text] : {std::pair{field::dtype, "dtype"}, std::pair{field::shape, "shape"},
                                      std::pair{field::offsets, "data_offsets"}}) {
        if ((seen_ & static_cast<unsigned>(bit)) == 0) return fail("tensor %s has no %s", name().c_str(), text);
      }
    }
    place_ = place_ == place::file ? place::outside : place::file;
    return true;
  }

  bool key(string_t& value) {
    if (place_ == place::metadata) {
      metadata.emplace_back(std::move(value), std::string());
      return true;
    }
    if (place_ == place::tensor) {
      field_ = value == "dtype"          ? field::dtype
               : value == "shape"        ? field::shape
               : value == "data_offsets" ? field::offsets
                                         : field::none;
      const auto bit = static_cast<unsigned>(field_);
      if (field_ == field::none) {
        return fail("tensor %s has an entry %s; known: dtype, shape, data_offsets", name().c_str(),
                    printable(value).c_str());
      }
      if ((seen_ & bit) != 0) return fail("tensor %s has %s twice", name().c_str(), value.c_str());
      seen_ |= bit;
      return true;
    }
    if (value == "__metadata__") {
      if (has_metadata_) return fail("the header has __metadata__ twice");
      has_metadata_ = true;
      place_ = place::metadata_value;
      return true;
    }
    entries.emplace_back();
    entries.back().name = std::move(value);
    place_ = place::tensor_value;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != place::tensor || (field_ != field::shape && field_ != field::offsets)) return unexpected("a list");
    place_ = field_ == field::shape ? place::shape : place::offsets;
    offsets_ = 0;
    return true;
  }

  bool end_array() {
    if (place_ == place::offsets && offsets_ != 2) {
      return fail("tensor %s has %d data_offsets, 2 are needed", name().c_str(), offsets_);
    }
    place_ = place::tensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
    return fail("the header is not valid JSON at byte %zu", position);
  }

 private:
  enum class place { outside, file, metadata_value, metadata, tensor_value, tensor, shape, offsets };
  enum class field : unsigned { none = 0, dtype = 1, shape = 2, offsets = 4 };

  template <class... Args>
  bool fail(const char* format, Args... args) {
    failure = status::error(errc::bad_file, format, args...);
    return false;
  }
  [[nodiscard]] std::string name() const { return printable(entries.back().name); }
  [[nodiscard]] std::string where() const {
    if (place_ == place::metadata || place_ == place::metadata_value) return "__metadata__";
    return place_ == place::outside || place_ == place::file || entries.empty() ? "its outermost object"
                                                                                : "tensor " + name();
  }
  bool unexpected(const char* what) { return fail("the header has %s where it may not, in %s", what, where().c_str()); }

  safetensors_limits limits_;
  place place_ = place::outside;
  field field_ = field::none;
  unsigned seen_ = 0;
  int offsets_ = 0;
  bool has_metadata_ = false;
};

/// Bytes of a tensor, -1 where their number passes 64 bits. An extent of 0 makes it empty whatever the others are, but
/// their product must be representable, too.
[[nodiscard]] inline index_t safetensors_bytes(safetensors_dtype dtype, std::span<const index_t> shape) noexcept {
  index_t elements = 1;
  bool empty = false;
  for (const index_t extent : shape) {
    if (extent < 0) return -1;
    empty = empty || extent == 0;
    elements = saturated_product(elements, std::max<index_t>(extent, 1));
  }
  if (elements > too_many / 8) return -1;
  return empty ? 0 : elements * static_cast<index_t>(facts_of(dtype).bytes);
}

/// What a header says. `check` comes after reading and sorts by name.
struct safetensors_header {
  std::vector<safetensors_entry> entries;
  std::vector<std::pair<std::string, std::string>> metadata;

  /// The length of a header, from the 8 bytes before it, against the bytes of the file.
  [[nodiscard]] static status check_length(std::uint64_t header_bytes, std::uint64_t file_bytes,
                                           const safetensors_limits& limits) noexcept {
    if (header_bytes > limits.header_bytes) {
      return status::error(errc::bad_file, "the header is said to have %llu bytes, at most %zu are read",
                           static_cast<unsigned long long>(header_bytes), limits.header_bytes);
    }
    if (header_bytes > file_bytes - 8) {
      return status::error(errc::bad_file, "the file is truncated: its header is said to have %llu bytes, %llu follow",
                           static_cast<unsigned long long>(header_bytes),
                           static_cast<unsigned long long>(file_bytes - 8));
    }
    return {};
  }

  /// Reads the header's characters and checks what they say of `data_bytes` bytes of data. Takes memory for what is
  /// said so far, whatever the header's length.
  template <class Iterator>
  [[nodiscard]] status read(Iterator first, Iterator last, std::uint64_t data_bytes, const safetensors_limits& limits) {
    if (first == last || *first != '{') {
      return status::error(errc::bad_file, "the header does not begin with '{': not a safetensors file");
    }
    safetensors_header_reader reader(limits);
    if (!nlohmann::json::sax_parse(std::move(first), std::move(last), &reader)) {
      return reader.failure.ok() ? status::error(errc::bad_file, "the header is not valid JSON") : reader.failure;
    }
    entries = std::move(reader.entries);
    metadata = std::move(reader.metadata);
    return check(data_bytes);
  }

 private:
  /// What can be checked only when the whole header is known; sorts the entries by name.
  [[nodiscard]] status check(std::uint64_t data_bytes) {
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    std::sort(metadata.begin(), metadata.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (std::size_t i = 1; i < entries.size(); ++i) {
      if (entries[i].name == entries[i - 1].name) {
        return status::error(errc::bad_file, "the header has tensor %s twice", printable(entries[i].name).c_str());
      }
    }
    for (std::size_t i = 1; i < metadata.size(); ++i) {
      if (metadata[i].first == metadata[i - 1].first) {
        return status::error(errc::bad_file, "__metadata__ has %s twice", printable(metadata[i].first).c_str());
      }
    }
    for (const safetensors_entry& entry : entries) RESTKV_RETURN_IF_FAILED(check_extents(entry, data_bytes));
    std::vector<const safetensors_entry*> order;
    for (const safetensors_entry& entry : entries) order.push_back(&entry);
    std::sort(order.begin(), order.end(),
              [](const auto* a, const auto* b) { return std::pair(a->begin, a->end) < std::pair(b->begin, b->end); });
    std::size_t covered = 0;
    for (const safetensors_entry* entry : order) {
      if (entry->begin != covered) {
        return status::error(errc::bad_file, "tensor %s begins at byte %zu of the data, the one before ends at %zu",
                             printable(entry->name).c_str(), entry->begin, covered);
      }
      covered = entry->end;
    }
    if (covered != data_bytes) {
      return status::error(errc::bad_file, "the tensors end at byte %zu of the data, the file has %llu", covered,
                           static_cast<unsigned long long>(data_bytes));
    }
    return {};
  }

  [[nodiscard]] static status check_extents(const safetensors_entry& entry, std::uint64_t data_bytes) {
    const std::string name = printable(entry.name);
    if (entry.begin > entry.end || entry.end > data_bytes) {
      return status::error(errc::bad_file, "tensor %s occupies bytes %zu to %zu of the data, the file has %llu",
                           name.c_str(), entry.begin, entry.end, static_cast<unsigned long long>(data_bytes));
    }
    const index_t needed = safetensors_bytes(entry.dtype, entry.shape);
    if (needed < 0) {
      return status::error(errc::bad_file, "tensor %s is %s: its size overflows 64 bits", name.c_str(),
                           printable(entry.description()).c_str());
    }
    if (static_cast<std::uint64_t>(needed) != entry.end - entry.begin) {
      return status::error(errc::bad_file, "tensor %s is %s, which takes %lld bytes; its data_offsets span %zu",
                           name.c_str(), printable(entry.description()).c_str(), static_cast<long long>(needed),
                           entry.end - entry.begin);
    }
    return {};
  }
};

}  // namespace detail

}  // namespace restkv
