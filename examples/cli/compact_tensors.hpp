// SPDX-License-Identifier: Apache-2.0
/// @file
/// The kept keys and values of a file, bit by bit.
#pragma once

#include <restkv/interop/safetensors_writer.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <string>

namespace restkv::cli {

/// Adds k and v to the output: the kept tokens of each head of `kept`, in the file's dtypes. Heads that all keep
/// equally many give [heads, kept, head_dim]; otherwise the heads lie behind each other, [total, head_dim], and
/// `offsets` [heads + 1] says where each begins. A set per query head holds each KV head once for each of its query
/// heads.
void add_compact_tensors(safetensors_writer& out, const safetensors_file& file, const std::string& prefix,
                         const const_kept_tokens& kept, const std::string& where);

}  // namespace restkv::cli
