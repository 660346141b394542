// SPDX-License-Identifier: Apache-2.0
#include "cuda/cache_on_device.hpp"

#include <restkv/backend/cuda/backend.cuh>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/backend/kernel_running.hpp>

using namespace restkv;

// Those that no test runs on a device yet: compiled, and their registers counted.
namespace restkv {

constexpr memory_space device = memory_space::device;
template <class T>
using tensor4 = tensor_view<T, 4, device>;

template status rotate_keys(cuda_backend&, const const_device_kept_tokens&, const tensor4<half>&,
                            const key_rotation<device>&);
template status rotate_keys(cuda_backend&, const const_device_kept_tokens&, const tensor4<float>&,
                            const key_rotation<device>&);
template status gather_tokens(cuda_backend&, const const_device_kept_tokens&, const tensor4<std::uint8_t>&,
                              const tensor4<std::uint8_t>&);
template status gather_tokens(cuda_backend&, const const_device_kept_tokens&, const paged_layout<const float, device>&,
                              const tensor4<float>&);
template status gather_tokens(cuda_backend&, const const_device_kept_tokens&, const tensor4<double>&,
                              const tensor4<double>&);
template status move_tokens(cuda_backend&, const const_device_kept_tokens&, const paged_layout<float, device>&,
                            const basic_page_tables<const page_t, device>&);
template status move_tokens(cuda_backend&, const const_device_kept_tokens&, const paged_layout<std::uint8_t, device>&,
                            const basic_page_tables<const page_t, device>&);
template status gather_tokens(cuda_backend&, const const_device_kept_tokens&, const quantised_view<const half, device>&,
                              const quantised_view<half, device>&);
template status gather_tokens(cuda_backend&, const const_device_kept_tokens&, const quantised_view<float, device>&,
                              const quantised_view<float, device>&);
template status compact_in_place(cuda_backend&, const const_device_kept_tokens&, const quantised_view<half, device>&);
template status compact_in_place(cuda_backend&, const const_device_kept_tokens&, const quantised_view<float, device>&);
template void detail::fold_scores(kernel::stream_executor&, const running_ema&,
                                  const tensor_view<const float, 3, device>&, index_t, const running_layer<device>&);

}  // namespace restkv

namespace restkv_test {

namespace {

template <class T, std::size_t Rank>
status copy_dense(const tensor_view<const T, Rank>& host, device_buffer<T>& memory,
                  tensor_view<T, Rank, memory_space::device>& view) {
  if (!host.dense()) {
    return status::error(errc::shape_mismatch, "the test hands over a stride of %lld, must be dense",
                         static_cast<long long>(host.strides[Rank - 1]));
  }
  RESTKV_RETURN_IF_FAILED(memory.assign(std::span<const T>(host.data, static_cast<std::size_t>(host.size()))));
  view = tensor_view<T, Rank, memory_space::device>(memory.data(), host.extents);
  return {};
}

template <class T>
status read_back(const device_buffer<T>& memory, std::vector<T>& values) {
  values.resize(static_cast<std::size_t>(memory.size()));
  return memory.copy_to(values);
}

/// Enqueues on a stream, and returns what came of it there.
template <class Enqueue>
status finish(const char* action, const Enqueue& enqueue) {
  RESTKV_RETURN_IF_FAILED(enqueue());
  return cuda_status(action, cudaDeviceSynchronize());
}

/// Compacts with keys as T, turned or not.
template <class T, class Rotation>
status run(compaction how, const compaction_options& options, const Rotation& rotation,
           const const_kept_tokens& host_kept, const tensor_view<const std::uint16_t, 4>& host_key,
           const tensor_view<const std::uint16_t, 4>& host_value, compacted& made) {
  constexpr memory_space device = memory_space::device;
  using cache = tensor_view<std::uint16_t, 4, device>;
  device_buffer<std::uint16_t> key_memory;
  device_buffer<std::uint16_t> value_memory;
  device_buffer<position_t> positions_memory;
  device_buffer<position_t> lengths_memory;
  device_buffer<page_t> ids_memory;
  device_buffer<position_t> table_lengths_memory;
  cache key_bits;
  cache value;
  device_kept_tokens kept;
  RESTKV_RETURN_IF_FAILED(copy_dense(host_key, key_memory, key_bits));
  RESTKV_RETURN_IF_FAILED(copy_dense(host_value, value_memory, value));
  RESTKV_RETURN_IF_FAILED(copy_dense(host_kept.positions, positions_memory, kept.positions));
  RESTKV_RETURN_IF_FAILED(copy_dense(host_kept.lengths, lengths_memory, kept.lengths));
  const auto as_keys = [](const auto& view) {
    using view_t = std::remove_cvref_t<decltype(view)>;
    return tensor_view<T, view_t::rank, device>(reinterpret_cast<T*>(view.data), view.extents, view.strides);
  };
  const auto key = as_keys(key_bits);
  cuda_backend backend(nullptr);

  basic_page_tables<page_t, device> tables;
  if (how == compaction::paged || how == compaction::in_pages) {
    RESTKV_RETURN_IF_FAILED(ids_memory.allocate(options.tables.ids.size()));
    RESTKV_RETURN_IF_FAILED(table_lengths_memory.allocate(options.tables.lengths.size()));
    tables = {{ids_memory.data(), options.tables.ids.extents},
              {table_lengths_memory.data(), options.tables.lengths.extents}};
    RESTKV_RETURN_IF_FAILED(upload_tables(backend, options.tables, options.pages, options.page_size, tables));
  }
  const auto read_lengths = [&]() -> status {
    RESTKV_RETURN_IF_FAILED(
        finish("lengths of tables", [&] { return page_lengths(backend, kept, 1, tables.lengths); }));
    return read_back(table_lengths_memory, made.lengths);
  };
  if (how == compaction::in_place || how == compaction::in_pages) {
    RESTKV_RETURN_IF_FAILED(finish("compaction in place", [&] {
      if (how == compaction::in_place) return compact_in_place(backend, kept, key, value, rotation);
      return compact_in_place(backend, kept, paged_layout<T, device>{key, tables},
                              paged_layout<std::uint16_t, device>{value, tables}, rotation);
    }));
    if (how == compaction::in_pages) RESTKV_RETURN_IF_FAILED(read_lengths());
    RESTKV_RETURN_IF_FAILED(read_back(key_memory, made.key));
    return read_back(value_memory, made.value);
  }

  const index_t rows = host_kept.batch() * host_kept.heads();
  const index_t capacity = host_kept.capacity();
  const index_t channels = host_key.extent(3);
  const index_t places = how == compaction::paged ? options.pages * options.page_size : rows * capacity;
  const std::vector<std::uint16_t> unset(static_cast<std::size_t>(places * channels), 0xabcd);
  device_buffer<std::uint16_t> out_key;
  device_buffer<std::uint16_t> out_value;
  device_buffer<std::int64_t> offsets_memory;
  RESTKV_RETURN_IF_FAILED(out_key.assign(unset));
  RESTKV_RETURN_IF_FAILED(out_value.assign(unset));
  RESTKV_RETURN_IF_FAILED(offsets_memory.allocate(rows + 1));
  const tensor_view<std::int64_t, 1, device> offsets(offsets_memory.data(), {rows + 1});
  RESTKV_RETURN_IF_FAILED(finish("compaction", [&]() -> status {
    if (how == compaction::dense) {
      const std::array<index_t, 4> extents{host_kept.batch(), host_kept.heads(), capacity, channels};
      return compact(backend, kept, key, value, as_keys(cache(out_key.data(), extents)),
                     cache(out_value.data(), extents), rotation);
    }
    if (how == compaction::paged) {
      const std::array<index_t, 4> extents{options.pages, 1, options.page_size, channels};
      return compact(backend, kept, key, value,
                     paged_layout<T, device>{as_keys(cache(out_key.data(), extents)), tables},
                     paged_layout<std::uint16_t, device>{cache(out_value.data(), extents), tables}, rotation);
    }
    RESTKV_RETURN_IF_FAILED(ragged_offsets(backend, kept, offsets));
    using ragged = tensor_view<std::uint16_t, 2, device>;
    const std::array<index_t, 2> extents{places, channels};
    return compact(backend, kept, key, value, ragged_rows<T, device>{as_keys(ragged(out_key.data(), extents)), offsets},
                   ragged_rows<std::uint16_t, device>{ragged(out_value.data(), extents), offsets}, rotation);
  }));
  if (how == compaction::ragged) RESTKV_RETURN_IF_FAILED(read_back(offsets_memory, made.offsets));
  if (how == compaction::paged) RESTKV_RETURN_IF_FAILED(read_lengths());
  RESTKV_RETURN_IF_FAILED(read_back(out_key, made.key));
  return read_back(out_value, made.value);
}

/// The memory of a `decode_loop` on a device.
struct device_decode_memory {
  static constexpr memory_space space = memory_space::device;
  using backend_type = cuda_backend;
  template <class T>
  using buffer = device_buffer<T>;

  static cuda_backend backend() { return cuda_backend(nullptr); }
  template <class T>
  static status put(buffer<T>& memory, std::span<const T> values) {
    return memory.assign(values);
  }
  template <class T>
  static status get(const buffer<T>& memory, std::vector<T>& values) {
    RESTKV_RETURN_IF_FAILED(cuda_status("a decode loop", cudaDeviceSynchronize()));
    return read_back(memory, values);
  }
};

}  // namespace

compacted compact_on_device(compaction how, const const_kept_tokens& kept,
                            const tensor_view<const std::uint16_t, 4>& key,
                            const tensor_view<const std::uint16_t, 4>& value, const compaction_options& options) {
  compacted made;
  if (options.frequencies.empty()) {
    made.result = run<std::uint16_t>(how, options, no_rotation{}, kept, key, value, made);
    return made;
  }
  device_buffer<double> memory;
  made.result = memory.allocate(static_cast<index_t>(options.frequencies.size()));
  if (!made.result.ok()) return made;
  cuda_backend backend(nullptr);
  const tensor_view<double, 1, memory_space::device> frequencies(memory.data(), {memory.size()});
  made.result = upload_frequencies(backend, options.frequencies, frequencies);
  if (!made.result.ok()) return made;
  made.result = run<bfloat16>(how, options, key_rotation<memory_space::device>{frequencies}, kept, key, value, made);
  return made;
}

decoded decode_on_device(const decode_policy& policy, const problem_shape& shape, const decode_input& input) {
  return decode_loop<device_decode_memory>(policy, shape, input);
}

}  // namespace restkv_test
