// SPDX-License-Identifier: Apache-2.0
/// @file
/// Comparing a selection with results that are known.
#pragma once

#include "selection.hpp"

#include <restkv/interop/safetensors.hpp>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace restkv::cli {

/// A tensor of known results: one axis is [rows], two are [rows, columns].
template <class T>
struct known_tensor {
  std::string name;
  std::vector<T> elements;
  index_t rows = 0;
  index_t columns = 1;

  [[nodiscard]] const T* row(index_t r) const noexcept { return elements.data() + r * columns; }
};

/// Reads a tensor of floats or of whole numbers. Throws input_error, beginning with `path`, unless it is there with
/// `rows` rows, and as many axes as asked for.
template <class T>
[[nodiscard]] known_tensor<T> read_known(const safetensors_file& file, const std::string& path, const std::string& name,
                                         index_t rows, std::size_t axes);

/// What came out for one file.
struct file_outcome {
  std::string file;
  std::string method;
  std::vector<std::string> compared;            ///< names of tensors, each once
  std::map<std::string, double> largest_error;  ///< by backend: of a row of floats, relative to its maximum
  std::vector<std::string> mismatches;          ///< sentences
  std::vector<std::string> notes;               ///< differences that are explained, sentences
  std::string unusable;                         ///< why the file could not be compared; empty where it could

  [[nodiscard]] bool ok() const noexcept { return mismatches.empty() && unusable.empty(); }
};

/// Compares what one backend computed, and notes it in a file's outcome.
class comparison {
 public:
  comparison(file_outcome& outcome, std::string_view backend, double tolerance)
      : outcome_(outcome), backend_(backend), tolerance_(tolerance) {}

  /// Every row within `tolerance` of its largest magnitude. `ours` is [rows, our_columns]; columns of `known` beyond
  /// those are not looked at. Where a row differs by more, `rounding` is asked for what the known results may be off by
  /// themselves, [rows, our_columns], and that is allowed on top.
  void floats(const known_tensor<float>& known, const std::vector<double>& ours, index_t our_columns,
              const std::function<const std::vector<double>&()>& rounding = {});

  /// Numbers equal but for the rounding of float.
  void equal_floats(const known_tensor<float>& known, const std::vector<double>& ours);

  void equal_numbers(const known_tensor<std::int32_t>& known, const std::vector<std::int32_t>& ours);

  /// Kept sets equal, except for tokens that tie: `score` [rows, columns] says how tokens were ranked, and tokens that
  /// are in one set only must lie within `tolerance` of each other, relative to the last that was kept. A margin above
  /// `tolerance` (the smallest gap between a kept and a dropped score, where the file says it) admits no ties.
  void kept_sets(const known_tensor<std::int32_t>& known, const selection& ours, const std::vector<double>& score,
                 std::optional<double> margin);

  /// The tokens that a selection kept when it had no scores to show.
  void without_scores(const selection& ours, const selection& kept_only);

  /// Notes that a tensor was compared.
  void compared(const std::string& name);
  void mismatch(const std::string& sentence);

 private:
  [[nodiscard]] std::string labelled(const std::string& sentence) const;

  file_outcome& outcome_;
  std::string backend_;
  double tolerance_;
};

}  // namespace restkv::cli
