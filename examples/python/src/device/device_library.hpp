// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the module asks of a device's kernels. They live in a library of their own, which the module finds at run time:
/// `_restkv_cuda`, where it was built, and in tests the same kernels on the CPU.
#pragma once

#include "../numbers.hpp"

#include <restkv/backend/kernel_output_error.hpp>

#include <cstdint>

namespace restkv::cli {
struct configuration;
}

namespace restkv::python {

/// Changes whenever anything below does: the name of the capsule that hands a library over.
inline constexpr const char* device_library_capsule = "restkv.device_library.1";

/// A tensor in a device's memory.
struct device_tensor {
  bool given = false;
  void* data = nullptr;  ///< null where there are no elements
  number type = number::other;
  index_t item_bytes = 0;
  std::array<index_t, 4> extents{};  ///< of as many axes as there are
  std::array<index_t, 4> strides{};  ///< in elements

  /// As elements of a type of the same size.
  template <class T, std::size_t Rank, memory_space Space>
  [[nodiscard]] tensor_view<T, Rank, Space> view() const noexcept {
    tensor_view<T, Rank, Space> made;
    made.data = static_cast<T*>(data);
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      made.extents[axis] = extents[axis];
      made.strides[axis] = strides[axis];
    }
    return made;
  }
};

/// A layer: `layer_view` of some element type.
struct device_layer {
  device_tensor query;  ///< [batch, query_heads, queries, head_dim]; not given, but with extents, where there are none
  device_tensor key;    ///< [batch, kv_heads, tokens, head_dim]
  device_tensor value;  ///< the same, where it is given
  device_tensor projection;                      ///< [hidden, query_heads * head_dim], likewise
  device_tensor gram;                            ///< the parts of a metric, likewise: double
  device_tensor factor;                          ///< float
  device_tensor spectrum;                        ///< float
  tensor_view<const std::int32_t, 1> lengths{};  ///< of the host, as what follows
  tensor_view<const std::int32_t, 2> head_lengths{};
  tensor_view<const std::uint8_t, 2> keep_mask{};
  padding pad = padding::left;
};

/// A kept set. Rows of positions have room for `room`, of which `capacity` are looked at.
struct device_kept {
  index_t batch = 0;
  index_t heads = 0;
  index_t room = 0;
  index_t capacity = 0;
  position_t* positions = nullptr;
  position_t* lengths = nullptr;
};

/// Whose memory and order a call takes part in.
struct device_call {
  int device = 0;             ///< its number
  std::uintptr_t stream = 0;  ///< the caller's: everything is enqueued there
};

/// Gives a call its memory on the device, in the order of the stream. May throw; nobody on the way catches it.
class device_memory {
 public:
  virtual ~device_memory() = default;
  /// Of the call alone, aligned to 256 bytes.
  [[nodiscard]] virtual void* scratch(std::size_t bytes) = 0;
  ///@{
  /// For what comes out.
  [[nodiscard]] virtual device_kept kept(index_t batch, index_t heads, index_t room) = 0;
  [[nodiscard]] virtual double* tables(index_t elements) = 0;
  ///@}
};

/// Where compaction writes to: dense caches [batch, heads, slots, head_dim], zeros behind a head's tokens; or rows
/// [kept tokens, head_dim], with room for batch * heads * capacity, and where heads begin in them.
struct device_cache {
  device_tensor key;
  device_tensor value;
  std::int32_t* cu_seqlens = nullptr;  ///< [batch * heads + 1]; null: dense
};

/// The kernels. Every call enqueues and returns.
class device_library {
 public:
  virtual ~device_library() = default;
  /// DLPack's number of the kind of device.
  [[nodiscard]] virtual int device_type() const noexcept = 0;
  /// For people.
  [[nodiscard]] virtual const char* name() const noexcept = 0;

  /// `select`, `-1` behind each head's positions. errc::unsupported for policies that no kernel runs.
  [[nodiscard]] virtual status select(const device_call& call, const cli::configuration& c, const device_layer& layer,
                                      device_memory& memory) = 0;
  ///@{
  /// Copies elements of any type of 1, 2, 4 or 8 bytes.
  [[nodiscard]] virtual status compact(const device_call& call, const device_kept& kept, const device_tensor& key,
                                       const device_tensor& value, const device_cache& out, device_memory& memory) = 0;
  [[nodiscard]] virtual status compact_in_place(const device_call& call, const device_kept& kept,
                                                const device_tensor& key, const device_tensor& value) = 0;
  ///@}
  /// `output_error` of a plan that is made for the layer.
  [[nodiscard]] virtual status measure(const device_call& call, const device_kept& kept, const device_layer& layer,
                                       index_t queries, device_memory& memory, output_error_plan& plan) = 0;
};

}  // namespace restkv::python
