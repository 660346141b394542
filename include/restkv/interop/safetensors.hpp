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

#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
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
  if constexpr (std::is_same_v<T, half>) return safetensors_dtype::f16;
  else if constexpr (std::is_same_v<T, bfloat16>) return safetensors_dtype::bf16;
  else if constexpr (std::is_same_v<T, float>) return safetensors_dtype::f32;
  else if constexpr (std::is_same_v<T, double>) return safetensors_dtype::f64;
  else if constexpr (std::is_same_v<T, std::int8_t>) return safetensors_dtype::i8;
  else if constexpr (std::is_same_v<T, std::int32_t>) return safetensors_dtype::i32;
  else if constexpr (std::is_same_v<T, std::int64_t>) return safetensors_dtype::i64;
  else if constexpr (std::is_same_v<T, std::uint8_t>) return safetensors_dtype::u8;
  else static_assert(no_safetensors_dtype<T>, "safetensors have no such element type here");
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
      case place::outside: place_ = place::file; return true;
      case place::metadata_value: place_ = place::metadata; return true;
      case place::tensor_value:
        place_ = place::tensor;
        seen_ = 0;
        return true;
      default: return unexpected("an object");
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

}  // namespace detail

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
    const auto bad = [](const char* format, auto... args) { return status::error(errc::bad_file, format, args...); };
    if (bytes.size() < 8) return bad("the file has %zu bytes, the length of the header alone takes 8", bytes.size());
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), 8);
    if (header_bytes > limits.header_bytes) {
      return bad("the header is said to have %llu bytes, at most %zu are read",
                 static_cast<unsigned long long>(header_bytes), limits.header_bytes);
    }
    if (header_bytes > bytes.size() - 8) {
      return bad("the file is truncated: its header is said to have %llu bytes, %zu follow",
                 static_cast<unsigned long long>(header_bytes), bytes.size() - 8);
    }
    const auto* const text = reinterpret_cast<const char*>(bytes.data()) + 8;
    if (header_bytes == 0 || text[0] != '{') return bad("the header does not begin with '{': not a safetensors file");
    detail::safetensors_header_reader reader(limits);
    if (!nlohmann::json::sax_parse(text, text + header_bytes, &reader)) {
      return reader.failure.ok() ? bad("the header is not valid JSON") : reader.failure;
    }
    safetensors_view made;
    made.data_ = bytes.subspan(8 + static_cast<std::size_t>(header_bytes));
    made.entries_ = std::move(reader.entries);
    made.metadata_ = std::move(reader.metadata);
    RESTKV_RETURN_IF_FAILED(made.check());
    out = std::move(made);
    return {};
  }

  /// All tensors, by name.
  [[nodiscard]] const std::vector<safetensors_entry>& entries() const noexcept { return entries_; }
  /// Key and text, by key.
  [[nodiscard]] const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept { return metadata_; }

  /// Null when there is none of that name.
  [[nodiscard]] const safetensors_entry* find(std::string_view name) const noexcept {
    const auto at = std::lower_bound(entries_.begin(), entries_.end(), name,
                                     [](const safetensors_entry& e, std::string_view n) { return e.name < n; });
    return at != entries_.end() && at->name == name ? &*at : nullptr;
  }
  /// The text under a key of `__metadata__`, or null.
  [[nodiscard]] const std::string* find_metadata(std::string_view key) const noexcept {
    const auto at = std::lower_bound(metadata_.begin(), metadata_.end(), key,
                                     [](const auto& entry, std::string_view k) { return entry.first < k; });
    return at != metadata_.end() && at->first == key ? &at->second : nullptr;
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

 private:
  [[nodiscard]] status find_of_rank(std::string_view name, std::size_t rank, const safetensors_entry*& out) const {
    out = find(name);
    if (out == nullptr) {
      return status::error(errc::missing_input, "the file has no tensor %s among its %zu",
                           detail::printable(name).c_str(), entries_.size());
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

  /// What can be checked only when the whole header is known; sorts the entries by name.
  [[nodiscard]] status check() {
    std::sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    std::sort(metadata_.begin(), metadata_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (std::size_t i = 1; i < entries_.size(); ++i) {
      if (entries_[i].name == entries_[i - 1].name) {
        return status::error(errc::bad_file, "the header has tensor %s twice",
                             detail::printable(entries_[i].name).c_str());
      }
    }
    for (std::size_t i = 1; i < metadata_.size(); ++i) {
      if (metadata_[i].first == metadata_[i - 1].first) {
        return status::error(errc::bad_file, "__metadata__ has %s twice",
                             detail::printable(metadata_[i].first).c_str());
      }
    }
    for (const safetensors_entry& entry : entries_) RESTKV_RETURN_IF_FAILED(check_extents(entry));
    std::vector<const safetensors_entry*> order;
    for (const safetensors_entry& entry : entries_) order.push_back(&entry);
    std::sort(order.begin(), order.end(),
              [](const auto* a, const auto* b) { return std::pair(a->begin, a->end) < std::pair(b->begin, b->end); });
    std::size_t covered = 0;
    for (const safetensors_entry* entry : order) {
      if (entry->begin != covered) {
        return status::error(errc::bad_file, "tensor %s begins at byte %zu of the data, the one before ends at %zu",
                             detail::printable(entry->name).c_str(), entry->begin, covered);
      }
      covered = entry->end;
    }
    if (covered != data_.size()) {
      return status::error(errc::bad_file, "the tensors end at byte %zu of the data, the file has %zu", covered,
                           data_.size());
    }
    return {};
  }

  [[nodiscard]] status check_extents(const safetensors_entry& entry) const {
    const std::string name = detail::printable(entry.name);
    if (entry.begin > entry.end || entry.end > data_.size()) {
      return status::error(errc::bad_file, "tensor %s occupies bytes %zu to %zu of the data, the file has %zu",
                           name.c_str(), entry.begin, entry.end, data_.size());
    }
    // An extent of 0 makes the tensor empty whatever the others are, but their product must be representable, too.
    std::uint64_t elements = 1;
    bool empty = false;
    for (const index_t extent : entry.shape) {
      empty = empty || extent == 0;
      const auto count = static_cast<std::uint64_t>(std::max<index_t>(extent, 1));
      if (count > static_cast<std::uint64_t>(std::numeric_limits<index_t>::max()) / 8 / elements) {
        return status::error(errc::bad_file, "tensor %s is %s: its size overflows 64 bits", name.c_str(),
                             detail::printable(entry.description()).c_str());
      }
      elements *= count;
    }
    const std::uint64_t needed = empty ? 0 : elements * facts_of(entry.dtype).bytes;
    if (needed != entry.end - entry.begin) {
      return status::error(errc::bad_file, "tensor %s is %s, which takes %llu bytes; its data_offsets span %zu",
                           name.c_str(), detail::printable(entry.description()).c_str(),
                           static_cast<unsigned long long>(needed), entry.end - entry.begin);
    }
    return {};
  }

  std::span<const std::byte> data_;
  std::vector<safetensors_entry> entries_;
  std::vector<std::pair<std::string, std::string>> metadata_;
};

/// A file, read whole. Owns its bytes; views of its tensors are valid as long as it lives. Movable.
class safetensors_file : public safetensors_view {
 public:
  safetensors_file() = default;

  /// Reads and checks a file. Nothing changes in `out` on failure. The data begins at a multiple of 64 bytes in memory.
  ///
  /// Errors (errc::bad_file), beginning with the path: a file that cannot be read, and those of `parse`.
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
    // The length of the header says where the data will begin, and so how far to shift the file for its alignment.
    std::uint64_t header_bytes = 0;
    if (size >= 8 && std::fread(&header_bytes, 1, 8, file.get()) != 8) return bad("cannot be read");
    std::rewind(file.get());
    constexpr std::size_t alignment = 64;
    safetensors_file made;
    made.memory_.resize(static_cast<std::size_t>(size) + alignment);
    const auto address = reinterpret_cast<std::uintptr_t>(made.memory_.data()) + 8 + header_bytes;
    const std::size_t shift = (alignment - address % alignment) % alignment;
    const std::span<std::byte> content = std::span(made.memory_).subspan(shift, static_cast<std::size_t>(size));
    if (std::fread(content.data(), 1, content.size(), file.get()) != content.size()) return bad("cannot be read");
    const status parsed = parse(content, made, limits);
    if (!parsed.ok()) return status::error(parsed.code(), "%s", (path + ": " + parsed.message()).c_str());
    out = std::move(made);
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
  std::vector<std::byte> memory_;
};

}  // namespace restkv
