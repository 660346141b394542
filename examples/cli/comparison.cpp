// SPDX-License-Identifier: Apache-2.0
#include "comparison.hpp"

#include "command.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

namespace restkv::cli {

template <class T>
known_tensor<T> read_known(const safetensors_file& file, const std::string& path, const std::string& name, index_t rows,
                           std::size_t axes) {
  known_tensor<T> known;
  known.name = name;
  if (axes == 1) {
    tensor_view<T, 1> view;
    require(file.convert(name, known.elements, view), path);
    known.rows = view.extent(0);
  } else {
    tensor_view<T, 2> view;
    require(file.convert(name, known.elements, view), path);
    known.rows = view.extent(0);
    known.columns = view.extent(1);
  }
  if (known.rows != rows) {
    throw input_error(
        fmt::format("{}: tensor {} has {} rows, the configuration gives {}", path, name, known.rows, rows));
  }
  return known;
}

template known_tensor<float> read_known(const safetensors_file&, const std::string&, const std::string&, index_t,
                                        std::size_t);
template known_tensor<std::int32_t> read_known(const safetensors_file&, const std::string&, const std::string&, index_t,
                                               std::size_t);

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// |a - b|, 0 where both are NaN, infinite where one is.
double difference(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b) ? 0.0 : infinity;
  return a == b ? 0.0 : std::abs(a - b);
}

}  // namespace

void comparison::compared(const std::string& name) {
  const std::string last = name.substr(name.rfind('.') + 1);
  auto& all = outcome_.compared;
  if (std::find(all.begin(), all.end(), last) == all.end()) all.push_back(last);
}

std::string comparison::labelled(const std::string& sentence) const {
  return fmt::format("{}: {}", backend_, sentence);
}

void comparison::mismatch(const std::string& sentence) { outcome_.mismatches.push_back(labelled(sentence)); }

void comparison::floats(const known_tensor<float>& known, const std::vector<double>& ours, index_t our_columns,
                        const std::function<const std::vector<double>&()>& rounding) {
  compared(known.name);
  if (known.columns < our_columns) {
    mismatch(fmt::format("{} has {} columns, {} were computed", known.name, known.columns, our_columns));
    return;
  }
  // Largest difference beyond what is allowed for each element, relative to the row's maximum; and its row.
  const auto worst_row = [&](const std::vector<double>* allowed) {
    std::pair<double, index_t> worst{0, 0};
    for (index_t r = 0; r < known.rows; ++r) {
      double largest = 0;
      double error = 0;
      for (index_t c = 0; c < our_columns; ++c) {
        const auto at = static_cast<std::size_t>(r * our_columns + c);
        const auto expected = static_cast<double>(known.row(r)[c]);
        largest = std::max(largest, std::abs(expected));
        const double slack = allowed == nullptr || !std::isfinite((*allowed)[at]) ? 0 : (*allowed)[at];
        error = std::max(error, difference(expected, ours[at]) - slack);
      }
      const double relative = std::isfinite(largest) && std::isfinite(error) ? error / largest : infinity;
      worst = std::max(worst, {error == 0 ? 0 : relative, r},
                       [](const auto& a, const auto& b) { return a.first < b.first; });
    }
    return worst;
  };
  const auto [error, row] = worst_row(nullptr);
  double& noted = outcome_.largest_error[backend_];
  noted = std::max(noted, error);
  if (error <= tolerance_) return;
  const std::string sentence =
      fmt::format("{} of row {} differs by {:.3g} of the row's maximum", known.name, row, error);
  if (rounding && worst_row(&rounding()).first <= tolerance_) {
    outcome_.notes.push_back(
        labelled(sentence + ", within the rounding of known scores that come from a / (1 - a) in float"));
    return;
  }
  mismatch(fmt::format("{}, {:g} is allowed", sentence, tolerance_));
}

void comparison::equal_floats(const known_tensor<float>& known, const std::vector<double>& ours) {
  compared(known.name);
  for (std::size_t i = 0; i < known.elements.size(); ++i) {
    const auto expected = static_cast<double>(known.elements[i]);
    if (!std::isfinite(expected) || !(difference(expected, ours[i]) <= 1e-5 * std::max(1.0, std::abs(expected)))) {
      mismatch(fmt::format("{} of row {} is {}, {} was computed", known.name, i, expected, ours[i]));
      return;
    }
  }
}

void comparison::equal_numbers(const known_tensor<std::int32_t>& known, const std::vector<std::int32_t>& ours) {
  compared(known.name);
  for (std::size_t i = 0; i < known.elements.size(); ++i) {
    if (known.elements[i] != ours[i]) {
      mismatch(fmt::format("{} of row {} is {}, {} was computed", known.name, i, known.elements[i], ours[i]));
      return;
    }
  }
}

void comparison::kept_sets(const known_tensor<std::int32_t>& known, const selection& ours,
                           const std::vector<double>& score, std::optional<double> margin) {
  compared(known.name);
  for (index_t h = 0; h < known.rows; ++h) {
    std::vector<position_t> expected(known.row(h), known.row(h) + known.columns);
    std::sort(expected.begin(), expected.end());
    const bool usable = std::adjacent_find(expected.begin(), expected.end()) == expected.end() &&
                        (expected.empty() || (expected.front() >= 0 && expected.back() < ours.past));
    if (!usable) {
      mismatch(fmt::format("{} of row {} repeats a position or leaves [0, {})", known.name, h, ours.past));
      return;
    }
    const std::vector<position_t> kept = ours.kept_past(h);
    if (kept.size() != expected.size()) {
      mismatch(
          fmt::format("{} of row {} holds {} positions, {} were kept", known.name, h, expected.size(), kept.size()));
      return;
    }
    std::vector<position_t> differing;
    std::set_symmetric_difference(expected.begin(), expected.end(), kept.begin(), kept.end(),
                                  std::back_inserter(differing));
    if (differing.empty()) continue;
    const auto score_of = [&](position_t n) { return score[static_cast<std::size_t>(h * ours.past + n)]; };
    const auto by_score = [&](position_t a, position_t b) { return score_of(a) < score_of(b); };
    const auto [lowest, highest] = std::minmax_element(differing.begin(), differing.end(), by_score);
    const double cut = score_of(*std::min_element(kept.begin(), kept.end(), by_score));
    const double gap = score_of(*highest) - score_of(*lowest);
    const bool ties_possible = !margin || *margin <= tolerance_;
    if (ties_possible && gap <= tolerance_ * std::abs(cut)) continue;
    mismatch(fmt::format("{} of row {} differs in {} tokens, among them {} (scores {:.6g} to {:.6g})", known.name, h,
                         differing.size() / 2, differing.front(), score_of(*lowest), score_of(*highest)));
    return;
  }
}

void comparison::without_scores(const selection& ours, const selection& kept_only) {
  for (index_t h = 0; h < ours.heads; ++h) {
    if (ours.kept_of(h) != kept_only.kept_of(h)) {
      mismatch(fmt::format("head {} keeps other tokens when its scores are not shown", h));
      return;
    }
  }
}

}  // namespace restkv::cli
