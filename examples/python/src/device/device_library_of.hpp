// SPDX-License-Identifier: Apache-2.0
/// @file
/// `device_library_of<Device>`: the calls of a `device_library` on a `kernel_backend`.
#pragma once

#include "device_selection.hpp"

#include "command.hpp"

#include <restkv/backend/kernel_compact.hpp>

#include <utility>

namespace restkv::python {

/// Zeros behind the kept tokens of each head of a dense cache. For each element.
template <class T, memory_space Space>
struct clear_rest {
  const position_t* lengths;  ///< [batch, heads]
  tensor_view<T, 4, Space> out;

  RESTKV_HD void operator()(index_t i) const noexcept {
    const index_t channel = i % out.extents[3];
    const index_t slot = i / out.extents[3] % out.extents[2];
    const index_t row = i / (out.extents[3] * out.extents[2]);
    const index_t h = row % out.extents[1];
    const index_t b = row / out.extents[1];
    if (slot >= lengths[row]) out.data[out.offset(b, h, slot, channel)] = T{0};
  }
};

/// Offsets as attention libraries want them. For each.
struct narrow_offsets {
  const std::int64_t* from;
  std::int32_t* to;

  RESTKV_HD void operator()(index_t i) const noexcept { to[i] = static_cast<std::int32_t>(from[i]); }
};

/// Device: `using backend = ...`, a kernel_backend; `device_type`, `name`; `use(call, visit)`, which returns
/// visit(backend) on the call's device and stream; `with_element(type, visit)`, which returns visit(T{}) for the types
/// that it has.
template <class Device>
class device_library_of final : public device_library {
  using backend_type = typename Device::backend;
  static constexpr memory_space space = backend_type::space;

 public:
  [[nodiscard]] int device_type() const noexcept override { return Device::device_type; }
  [[nodiscard]] const char* name() const noexcept override { return Device::name; }

  [[nodiscard]] status select(const device_call& call, const cli::configuration& c, const device_layer& from,
                              device_memory& memory) override {
    if (c.rescoring != cli::rescoring_kind::none) {
      return status::error(errc::unsupported, "the rescoring %s runs on the CPU alone: take the tensors there",
                           cli::name_of(c.rescoring));
    }
    if (c.spatial == cli::spatial_kind::segments) {  // found by the host, from the layer's keys
      return status::error(errc::unsupported,
                           "the spatial smoother segments runs on the CPU alone: take the tensors there");
    }
    return with_layer(from, [&]<element T>(const layer_view<T, space>& layer) {
      return guarded([&] {
        return Device::use(call, [&](backend_type& backend) -> status {
          using group = cli::score_group;
          switch (cli::group_of(c.method)) {
            case group::deletion: return select_group<group::deletion>(backend, c, layer, memory);
            case group::attention: return select_group<group::attention>(backend, c, layer, memory);
            case group::sizes: return select_group<group::sizes>(backend, c, layer, memory);
            case group::outputs: return select_group<group::outputs>(backend, c, layer, memory);
            case group::positions: return select_group<group::positions>(backend, c, layer, memory);
            case group::rescored:
            case group::heads: break;
          }
          return status::error(errc::unsupported, "the method %s runs on the CPU alone: take the tensors there",
                               cli::name_of(c.method));
        });
      });
    });
  }

  [[nodiscard]] status compact(const device_call& call, const device_kept& kept, const device_tensor& key,
                               const device_tensor& value, const device_cache& out, device_memory& memory) override {
    return with_bytes(key, value, [&]<class T>(T) -> status {
      return Device::use(call, [&](backend_type& backend) -> status {
        const auto set = view_of(kept);
        const auto keys = key.view<const T, 4, space>();
        const auto values = value.view<const T, 4, space>();
        if (out.cu_seqlens == nullptr) {
          const auto out_key = out.key.view<T, 4, space>();
          const auto out_value = out.value.view<T, 4, space>();
          RESTKV_RETURN_IF_FAILED(restkv::compact(backend, set, keys, values, out_key, out_value));
          for (const auto& to : {out_key, out_value}) {
            RESTKV_RETURN_IF_FAILED(backend.for_each(to.size(), clear_rest<T, space>{kept.lengths, to}));
          }
          return {};
        }
        const index_t entries = kept.batch * kept.heads + 1;
        auto* const begins =
            static_cast<std::int64_t*>(memory.scratch(static_cast<std::size_t>(entries) * sizeof(std::int64_t)));
        const tensor_view<std::int64_t, 1, space> offsets(begins, {entries});
        RESTKV_RETURN_IF_FAILED(ragged_offsets(backend, set, offsets));
        RESTKV_RETURN_IF_FAILED(restkv::compact(backend, set, keys, values,
                                                ragged_rows<T, space>{out.key.view<T, 2, space>(), offsets},
                                                ragged_rows<T, space>{out.value.view<T, 2, space>(), offsets}));
        return backend.for_each(entries, narrow_offsets{begins, out.cu_seqlens});
      });
    });
  }

  [[nodiscard]] status compact_in_place(const device_call& call, const device_kept& kept, const device_tensor& key,
                                        const device_tensor& value) override {
    return with_bytes(key, value, [&]<class T>(T) -> status {
      return Device::use(call, [&](backend_type& backend) -> status {
        return restkv::compact_in_place(backend, view_of(kept), key.view<T, 4, space>(), value.view<T, 4, space>());
      });
    });
  }

  [[nodiscard]] status measure(const device_call& call, const device_kept& kept, const device_layer& from,
                               index_t queries, device_memory& memory, output_error_plan& plan) override {
    return with_layer(from, [&]<element T>(const layer_view<T, space>& layer) -> status {
      const output_error_options options{.queries = queries,
                                         .kept_heads = kept.heads,
                                         .hidden = layer.projection.extent(0),
                                         .metric = !layer.metric.missing()};
      output_error_plan made;
      RESTKV_RETURN_IF_FAILED(plan_output_error(shape_of(layer), options, made));
      const tensor_view<double, 1, space> tables(memory.tables(made.table_elements()), {made.table_elements()});
      const workspace work(memory.scratch(made.workspace_bytes), made.workspace_bytes);
      RESTKV_RETURN_IF_FAILED(Device::use(call, [&](backend_type& backend) -> status {
        return output_error(backend, made, view_of(kept), layer, tables, work);
      }));
      plan = made;
      return {};
    });
  }

 private:
  /// What the parts of a policy throw, as a status.
  template <class Call>
  [[nodiscard]] static status guarded(const Call& call) {
    try {
      return call();
    } catch (const cli::input_error& problem) {
      return status::error(problem.code(), "%s", problem.what());
    }
  }

  [[nodiscard]] static basic_kept_tokens<const position_t, space> view_of(const device_kept& kept) noexcept {
    basic_kept_tokens<const position_t, space> view;
    view.positions.data = kept.positions;
    view.positions.extents = {kept.batch, kept.heads, kept.capacity};
    view.positions.strides = {kept.heads * kept.room, kept.room, 1};
    view.lengths = tensor_view<const position_t, 2, space>(kept.lengths, {kept.batch, kept.heads});
    return view;
  }

  /// Calls visit(layer) with the layer's tensors in their own element type.
  template <class Visit>
  [[nodiscard]] static status with_layer(const device_layer& from, const Visit& visit) {
    for (const auto& [name, other] :
         {std::pair("query", &from.query), std::pair("value", &from.value), std::pair("w_o", &from.projection)}) {
      if (!other->given || other->type == from.key.type) continue;
      return status::error(errc::unsupported, "key has elements of type %s, %s of %s: on a device they must be alike",
                           name_of(from.key.type), name, name_of(other->type));
    }
    return Device::with_element(from.key.type, [&]<element T>(T) -> status {
      layer_view<T, space> layer;
      layer.query = from.query.view<const T, 4, space>();
      layer.key = from.key.view<const T, 4, space>();
      if (from.value.given) layer.value = from.value.view<const T, 4, space>();
      if (from.projection.given) layer.projection = from.projection.view<const T, 2, space>();
      if (from.gram.given) {
        layer.metric.gram = from.gram.view<const double, 3, space>();
        layer.metric.factor = from.factor.view<const float, 3, space>();
        layer.metric.spectrum = from.spectrum.view<const float, 2, space>();
      }
      layer.lengths = from.lengths;
      layer.head_lengths = from.head_lengths;
      layer.keep_mask = from.keep_mask;
      layer.pad = from.pad;
      return visit(layer);
    });
  }

  /// Calls visit(T{}) with an unsigned type of the elements' size: copies do not look into them.
  template <class Visit>
  [[nodiscard]] static status with_bytes(const device_tensor& key, const device_tensor& value, const Visit& visit) {
    if (key.item_bytes != value.item_bytes) {
      return status::error(errc::unsupported, "key has elements of %lld bytes, value of %lld: they must be alike",
                           static_cast<long long>(key.item_bytes), static_cast<long long>(value.item_bytes));
    }
    switch (key.item_bytes) {
      case 1: return visit(std::uint8_t{});
      case 2: return visit(std::uint16_t{});
      case 4: return visit(std::uint32_t{});
      case 8: return visit(std::uint64_t{});
      default: break;
    }
    return status::error(errc::unsupported, "key has elements of %lld bytes, must be 1, 2, 4 or 8",
                         static_cast<long long>(key.item_bytes));
  }
};

}  // namespace restkv::python
