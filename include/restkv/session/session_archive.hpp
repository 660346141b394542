// SPDX-License-Identifier: Apache-2.0
/// @file
/// A session as bytes: `serialised_bytes`, `serialise` and `restore`.
///
/// The format, version 1, every number little-endian on every machine, floats as their IEEE 754 bits:
///
///     "restkv-s"                                              8 bytes
///     version, element type (0 float, 1 double, 2 half, 3 bfloat16)              2 x uint32
///     layers, query heads, KV heads, head_dim, tokens a head can hold, kept queries,
///       1 with running scores                                                    7 x int64
///     for each layer:
///       tokens seen, tokens since the last eviction, evictions                   3 x int64
///       length of each KV head                                                   int32 [kv_heads]
///       for each KV head: positions (int32 [length]), keys and values (elements [length, head_dim] each), and with
///         running scores how many queries saw each token (int32 [length])
///       with running scores, for each query head: what runs (float64 [length])
///       for each kept query, oldest first: elements [query_heads, head_dim]
///     64-bit FNV-1a of all bytes before it                                       uint64
#pragma once

#include <restkv/session/session.hpp>

#include <bit>
#include <cstring>

namespace restkv {

namespace detail {

/// 64-bit FNV-1a.
[[nodiscard]] inline std::uint64_t checksum(std::span<const std::byte> bytes) noexcept {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const std::byte byte : bytes) hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3u;
  return hash;
}

/// Copies numbers to or from little-endian bytes.
template <class T>
void copy_little_endian(const T* source, std::byte* bytes, index_t count) noexcept {
  if (count == 0) return;
  std::memcpy(bytes, source, static_cast<std::size_t>(count) * sizeof(T));
  if constexpr (std::endian::native == std::endian::big) {
    for (index_t i = 0; i < count; ++i) {
      std::byte* const number = bytes + static_cast<std::size_t>(i) * sizeof(T);
      std::reverse(number, number + sizeof(T));
    }
  }
}
template <class T>
void copy_little_endian(const std::byte* bytes, T* target, index_t count) noexcept {
  for (index_t i = 0; i < count; ++i) {
    std::array<std::byte, sizeof(T)> number;
    std::memcpy(number.data(), bytes + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
    if constexpr (std::endian::native == std::endian::big) std::reverse(number.begin(), number.end());
    std::memcpy(target + i, number.data(), sizeof(T));
  }
}

template <element T>
inline constexpr std::uint32_t element_code = std::is_same_v<T, float>    ? 0
                                              : std::is_same_v<T, double> ? 1
                                              : std::is_same_v<T, half>   ? 2
                                                                          : 3;

}  // namespace detail

/// Reads and writes a session; see the functions below.
template <tensor_backend Backend, class SessionPolicy, element T>
class session_archive {
  using session_type = session<Backend, SessionPolicy, T>;
  static constexpr std::size_t header_bytes = 8 + 2 * 4 + 7 * 8;

 public:
  /// See `serialised_bytes`.
  [[nodiscard]] static std::size_t bytes_of(const session_type& from) noexcept {
    std::size_t bytes = header_bytes + 8;
    for (index_t l = 0; l < from.layers(); ++l) bytes += layer_bytes(from.plan_, from.memory_.layers[l]);
    return bytes;
  }

  /// See `restkv::serialise`.
  [[nodiscard]] static status serialise(const session_type& from, std::span<std::byte> out,
                                        std::size_t& written) noexcept {
    RESTKV_RETURN_IF_FAILED(from.check_open());
    if (from.speculating_) {
      return status::error(errc::invalid_argument, "a session is not serialised during speculation");
    }
    const std::size_t bytes = bytes_of(from);
    if (out.size() < bytes) {
      return status::error(errc::workspace_too_small, "the session takes %zu bytes, there is room for %zu", bytes,
                           out.size());
    }
    std::byte* next = out.data();
    const auto put = [&next](index_t count, const auto* numbers) {
      detail::copy_little_endian(numbers, next, count);
      next += static_cast<std::size_t>(count) * sizeof(*numbers);
    };
    put(8, magic);
    const std::array<std::uint32_t, 2> kind{version, detail::element_code<T>};
    put(2, kind.data());
    const auto sizes = sizes_of(from.plan_);
    put(static_cast<index_t>(sizes.size()), sizes.data());
    for (index_t l = 0; l < from.layers(); ++l) {
      auto& layer = from.memory_.layers[l];
      const std::array<std::int64_t, 3> counts{layer.seen, layer.since_eviction, layer.evictions};
      put(3, counts.data());
      put(layer.lengths.extent(1), layer.lengths.data);
      detail::visit_arrays(from.plan_.window, put, layer);
    }
    const std::uint64_t sum = detail::checksum(out.first(bytes - 8));
    put(1, &sum);
    written = bytes;
    return {};
  }

  /// See `restkv::restore`.
  [[nodiscard]] static status restore(session_type& to, std::span<const std::byte> bytes) noexcept {
    RESTKV_RETURN_IF_FAILED(to.check_open());
    RESTKV_RETURN_IF_FAILED(check(to, bytes));
    to.clear();
    const std::byte* next = bytes.data() + header_bytes;
    const auto get = [&next](index_t count, auto* numbers) {
      detail::copy_little_endian(next, numbers, count);
      next += static_cast<std::size_t>(count) * sizeof(*numbers);
    };
    for (index_t l = 0; l < to.layers(); ++l) {
      auto& layer = to.memory_.layers[l];
      std::array<std::int64_t, 3> counts{};
      get(3, counts.data());
      layer.seen = counts[0];
      layer.since_eviction = counts[1];
      layer.evictions = counts[2];
      get(layer.lengths.extent(1), layer.lengths.data);
      detail::visit_arrays(to.plan_.window, get, layer);
      for (index_t t = layer.seen - std::min(to.plan_.window, layer.seen); t < layer.seen; ++t) layer.repeat_query(t);
    }
    return {};
  }

 private:
  static constexpr char magic[] = "restkv-s";
  static constexpr std::uint32_t version = 1;

  [[nodiscard]] static std::array<std::int64_t, 7> sizes_of(const session_plan<SessionPolicy>& plan) noexcept {
    return {plan.shape.layers,   plan.shape.query_heads, plan.shape.kv_heads, plan.shape.head_dim,
            plan.shape.tokens,   plan.window,            detail::runs<typename SessionPolicy::running_type> ? 1 : 0};
  }

  [[nodiscard]] static std::size_t layer_bytes(const session_plan<SessionPolicy>& plan,
                                               const detail::session_layer<T>& layer) noexcept {
    return layer_bytes(plan, layer.seen, [&](index_t h) -> index_t { return layer.lengths(0, h); });
  }

  /// Bytes of a layer whose KV head h has length(h) tokens.
  template <class Length>
  [[nodiscard]] static std::size_t layer_bytes(const session_plan<SessionPolicy>& plan, index_t seen,
                                               const Length& length) noexcept {
    const auto& shape = plan.shape;
    const bool running = detail::runs<typename SessionPolicy::running_type>;
    const auto row = static_cast<std::size_t>(shape.head_dim) * sizeof(T);
    std::size_t token = 4 + 2 * row;  // of a KV head
    if (running) token += 4 + 8 * static_cast<std::size_t>(shape.group());
    std::size_t bytes = 3 * 8 + 4 * static_cast<std::size_t>(shape.kv_heads);
    for (index_t h = 0; h < shape.kv_heads; ++h) bytes += token * static_cast<std::size_t>(length(h));
    return bytes + static_cast<std::size_t>(std::min(plan.window, seen) * shape.query_heads) * row;
  }

  /// Everything that could be wrong with the bytes; nothing is read behind their end.
  [[nodiscard]] static status check(const session_type& to, std::span<const std::byte> bytes) noexcept {
    const auto truncated = [&](std::size_t needed) {
      return status::error(errc::invalid_argument, "the serialised session is cut: %zu bytes, at least %zu are needed",
                           bytes.size(), needed);
    };
    if (bytes.size() < header_bytes + 8) return truncated(header_bytes + 8);
    if (std::memcmp(bytes.data(), magic, 8) != 0) {
      return status::error(errc::invalid_argument, "not a serialised session: it does not begin with %s", magic);
    }
    std::array<std::uint32_t, 2> kind{};
    detail::copy_little_endian(bytes.data() + 8, kind.data(), 2);
    if (kind[0] != version) {
      return status::error(errc::unsupported, "the serialised session has version %u, this library reads %u", kind[0],
                           version);
    }
    if (kind[1] != detail::element_code<T>) {
      return status::error(errc::shape_mismatch, "the serialised session has elements of type %u, this one has %u",
                           kind[1], detail::element_code<T>);
    }
    const auto wanted = sizes_of(to.plan_);
    auto sizes = wanted;
    detail::copy_little_endian(bytes.data() + 16, sizes.data(), static_cast<index_t>(sizes.size()));
    constexpr std::array<const char*, 7> names{"layers",          "query heads",  "KV heads",      "channels",
                                               "tokens per head", "kept queries", "running scores"};
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == wanted[i]) continue;
      return status::error(errc::shape_mismatch, "the serialised session has %lld %s, the plan has %lld",
                           static_cast<long long>(sizes[i]), names[i], static_cast<long long>(wanted[i]));
    }
    const problem_shape& shape = to.plan_.shape;
    std::size_t at = header_bytes;
    for (index_t l = 0; l < shape.layers; ++l) {
      const std::size_t fixed = 3 * 8 + 4 * static_cast<std::size_t>(shape.kv_heads);
      if (bytes.size() - 8 < at + fixed) return truncated(at + fixed + 8);
      RESTKV_RETURN_IF_FAILED(check_layer_at(to, bytes, l, at));
    }
    if (at + 8 != bytes.size()) {
      return status::error(errc::invalid_argument, "the serialised session takes %zu bytes, there are %zu", at + 8,
                           bytes.size());
    }
    const std::uint64_t sum = detail::checksum(bytes.first(at));
    std::uint64_t stored = 0;
    detail::copy_little_endian(bytes.data() + at, &stored, 1);
    if (stored != sum) {
      return status::error(errc::invalid_argument,
                           "the serialised session is damaged: its checksum is %016llx, not %016llx",
                           static_cast<unsigned long long>(sum), static_cast<unsigned long long>(stored));
    }
    return {};
  }

  /// Checks layer l at `at` and moves that behind it.
  [[nodiscard]] static status check_layer_at(const session_type& to, std::span<const std::byte> bytes, index_t l,
                                             std::size_t& at) noexcept {
    const problem_shape& shape = to.plan_.shape;
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    std::array<std::int64_t, 3> counts{};
    detail::copy_little_endian(bytes.data() + at, counts.data(), 3);
    const index_t seen = counts[0];
    if (seen < 0 || seen > std::numeric_limits<position_t>::max() || counts[1] < 0 || counts[1] > seen ||
        counts[2] < 0 || counts[2] > seen) {
      return status::error(errc::invalid_argument,
                           "the serialised layer %lld has seen %lld tokens, %lld since the last of %lld evictions",
                           ll(l), ll(seen), ll(counts[1]), ll(counts[2]));
    }
    const std::byte* const lengths = bytes.data() + at + 3 * 8;
    const auto number_at = [](const std::byte* numbers, index_t i) -> index_t {
      std::int32_t number = 0;
      detail::copy_little_endian(numbers + 4 * i, &number, 1);
      return number;
    };
    const auto length = [&](index_t h) { return number_at(lengths, h); };
    for (index_t h = 0; h < shape.kv_heads; ++h) {
      const index_t most = std::min(seen, shape.tokens - to.plan_.policy.speculation);
      if (length(h) >= 0 && length(h) <= most) continue;
      return status::error(errc::invalid_argument,
                           "head %lld of the serialised layer %lld has %lld tokens, at most %lld fit",
                           ll(h), ll(l), ll(length(h)), ll(most));
    }
    index_t total = 0;
    for (index_t h = 0; h < shape.kv_heads; ++h) total += length(h);
    if (total > shape.kv_heads * to.plan_.policy.high_water) {
      return status::error(errc::invalid_argument, "the serialised layer %lld has %lld tokens, the plan's mark is %lld",
                           ll(l), ll(total), ll(shape.kv_heads * to.plan_.policy.high_water));
    }
    const std::size_t size = layer_bytes(to.plan_, seen, length);
    if (bytes.size() - 8 < at + size) {
      return status::error(errc::invalid_argument, "the serialised session is cut: %zu bytes, at least %zu are needed",
                           bytes.size(), at + size + 8);
    }
    const std::byte* next = lengths + 4 * shape.kv_heads;
    for (index_t h = 0; h < shape.kv_heads; ++h) {
      index_t previous = -1;
      for (index_t i = 0; i < length(h); ++i) {
        const index_t position = number_at(next, i);
        if (position <= previous || position >= seen) {
          return status::error(errc::invalid_argument,
                               "position %lld in slot %lld of head %lld of the serialised layer %lld: must be above "
                               "%lld and below %lld",
                               ll(position), ll(i), ll(h), ll(l), ll(previous), ll(seen));
        }
        previous = position;
      }
      next += (4 + 2 * shape.head_dim * static_cast<index_t>(sizeof(T))) * length(h);
      if (!detail::runs<typename SessionPolicy::running_type>) continue;
      for (index_t i = 0; i < length(h); ++i) {
        const index_t observers = number_at(next, i);
        if (observers >= 0 && observers <= seen) continue;
        return status::error(errc::invalid_argument,
                             "slot %lld of head %lld of the serialised layer %lld was seen by %lld of %lld queries",
                             ll(i), ll(h), ll(l), ll(observers), ll(seen));
      }
      next += 4 * length(h);
    }
    at += size;
    return {};
  }
};

/// Bytes that `serialise` writes for a session as it is: what is kept, not what the memory could hold.
template <tensor_backend Backend, class SessionPolicy, element T>
[[nodiscard]] std::size_t serialised_bytes(const session<Backend, SessionPolicy, T>& from) noexcept {
  return session_archive<Backend, SessionPolicy, T>::bytes_of(from);
}

/// Writes a session to `out`, which may be larger, and says how many bytes that took. Fails, without writing, where the
/// room is too small and during speculation. Neither the policy's parameters nor W_O are written: restore with a plan
/// of the same policy.
template <tensor_backend Backend, class SessionPolicy, element T>
[[nodiscard]] status serialise(const session<Backend, SessionPolicy, T>& from, std::span<std::byte> out,
                               std::size_t& written) noexcept {
  return session_archive<Backend, SessionPolicy, T>::serialise(from, out, written);
}

/// Makes an open session what `serialise` wrote, bit for bit, whatever it held; a speculation is over. Everything is
/// checked first: bytes of another kind, version, element type or plan, cut, too long or damaged ones are refused, and
/// the session stays as it is.
template <tensor_backend Backend, class SessionPolicy, element T>
[[nodiscard]] status restore(session<Backend, SessionPolicy, T>& to, std::span<const std::byte> bytes) noexcept {
  return session_archive<Backend, SessionPolicy, T>::restore(to, bytes);
}

}  // namespace restkv
