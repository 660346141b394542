// SPDX-License-Identifier: Apache-2.0
#include "cuda/cache_on_device.hpp"

#include <restkv/backend/cuda/backend.cuh>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/kernel/quantised_gather.hpp>
#include <restkv/kernel/rotate_keys.hpp>
#include <restkv/kernel/running_update.hpp>

using namespace restkv;

// Those that no test runs on a device yet: compiled, and their registers counted.
namespace restkv::kernel {

constexpr memory_space device = memory_space::device;
template void gather<stream_executor>(stream_executor&, const kept_rows&, index_t, const token_rows&, const token_rows&);
template void compact_in_place<stream_executor>(stream_executor&, const kept_rows&, const token_rows&,
                                                const token_rows&);
template void rotate<restkv::half>(stream_executor&, const kept_rows&, const token_rows&, const double*, index_t,
                                   rotary_pairs, const slot_position&);
template void rotate<bfloat16>(stream_executor&, const kept_rows&, const token_rows&, const double*, index_t,
                               rotary_pairs, const slot_position&);
template void rotate<float>(stream_executor&, const kept_rows&, const token_rows&, const double*, index_t, rotary_pairs,
                            const slot_position&);
template void gather_codes<restkv::half>(stream_executor&, const kept_rows&, index_t,
                                         const quantised_view<restkv::half>&, const quantised_view<restkv::half>&);
template void gather_codes<float>(stream_executor&, const kept_rows&, index_t, const quantised_view<float>&,
                                  const quantised_view<float>&);
template void fold_scores(stream_executor&, const running_ema&, const tensor_view<const float, 2, device>&,
                          const tensor_view<const position_t, 1, device>&, index_t,
                          const tensor_view<double, 2, device>&, const tensor_view<std::int32_t, 2, device>&);
template void fold_scores(stream_executor&, const running_sum&, const tensor_view<const float, 2, device>&,
                          const tensor_view<const position_t, 1, device>&, index_t,
                          const tensor_view<double, 2, device>&, const tensor_view<std::int32_t, 2, device>&);

}  // namespace restkv::kernel

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

status run(compaction how, const const_kept_tokens& host_kept, const tensor_view<const std::uint16_t, 4>& host_key,
           const tensor_view<const std::uint16_t, 4>& host_value, compacted& made) {
  using cache = tensor_view<std::uint16_t, 4, memory_space::device>;
  device_buffer<std::uint16_t> key_memory;
  device_buffer<std::uint16_t> value_memory;
  device_buffer<position_t> positions_memory;
  device_buffer<position_t> lengths_memory;
  cache key;
  cache value;
  device_kept_tokens kept;
  RESTKV_RETURN_IF_FAILED(copy_dense(host_key, key_memory, key));
  RESTKV_RETURN_IF_FAILED(copy_dense(host_value, value_memory, value));
  RESTKV_RETURN_IF_FAILED(copy_dense(host_kept.positions, positions_memory, kept.positions));
  RESTKV_RETURN_IF_FAILED(copy_dense(host_kept.lengths, lengths_memory, kept.lengths));
  cuda_backend backend(nullptr);
  if (how == compaction::in_place) {
    RESTKV_RETURN_IF_FAILED(compact_in_place(backend, kept, key, value));
    RESTKV_RETURN_IF_FAILED(cuda_status("compaction in place", cudaDeviceSynchronize()));
    RESTKV_RETURN_IF_FAILED(read_back(key_memory, made.key));
    return read_back(value_memory, made.value);
  }
  const index_t rows = host_kept.batch() * host_kept.heads();
  const index_t capacity = host_kept.capacity();
  const index_t channels = host_key.extent(3);
  device_buffer<std::uint16_t> out_key;
  device_buffer<std::uint16_t> out_value;
  const std::vector<std::uint16_t> unset(static_cast<std::size_t>(rows * capacity * channels), 0xabcd);
  RESTKV_RETURN_IF_FAILED(out_key.assign(unset));
  RESTKV_RETURN_IF_FAILED(out_value.assign(unset));
  if (how == compaction::dense) {
    const std::array<index_t, 4> extents{host_kept.batch(), host_kept.heads(), capacity, channels};
    RESTKV_RETURN_IF_FAILED(
        compact(backend, kept, key, value, cache(out_key.data(), extents), cache(out_value.data(), extents)));
  } else {
    device_buffer<std::int64_t> offsets_memory;
    RESTKV_RETURN_IF_FAILED(offsets_memory.allocate(rows + 1));
    const tensor_view<std::int64_t, 1, memory_space::device> offsets(offsets_memory.data(), {rows + 1});
    RESTKV_RETURN_IF_FAILED(ragged_offsets(backend, kept, offsets));
    using ragged = ragged_rows<std::uint16_t, memory_space::device>;
    const std::array<index_t, 2> extents{rows * capacity, channels};
    RESTKV_RETURN_IF_FAILED(compact(backend, kept, key, value, ragged{{out_key.data(), extents}, offsets},
                                    ragged{{out_value.data(), extents}, offsets}));
    RESTKV_RETURN_IF_FAILED(cuda_status("compaction", cudaDeviceSynchronize()));
    RESTKV_RETURN_IF_FAILED(read_back(offsets_memory, made.offsets));
  }
  RESTKV_RETURN_IF_FAILED(cuda_status("compaction", cudaDeviceSynchronize()));
  RESTKV_RETURN_IF_FAILED(read_back(out_key, made.key));
  return read_back(out_value, made.value);
}

}  // namespace

compacted compact_on_device(compaction how, const const_kept_tokens& kept,
                            const tensor_view<const std::uint16_t, 4>& key,
                            const tensor_view<const std::uint16_t, 4>& value) {
  compacted made;
  made.result = run(how, kept, key, value, made);
  return made;
}

}  // namespace restkv_test
