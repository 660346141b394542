// SPDX-License-Identifier: Apache-2.0
/// @file
/// Checking a kernel or a backend against the reference on generated problems, with one call.
///
///     auto report = restkv::parity::compare_top_k(my_top_k, {.cases = 500});
///     if (!report) std::puts(report.text());
///
/// Problems (`parity::problem`) have sizes around tiles and budgets, tensors in every arrangement of memory, padding on
/// both sides and numbers that are meant to break something. What is not exact by nature is held to a bound from n u
/// sum |x| that is computed beside it. The first difference is reported with the smallest problem that shows it.
#pragma once

#include <restkv/verify/parity/gather.hpp>
#include <restkv/verify/parity/selection.hpp>
#include <restkv/verify/parity/token_scores.hpp>
#include <restkv/verify/parity/top_k.hpp>
