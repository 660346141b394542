# SPDX-License-Identifier: Apache-2.0
"""The official metrics of the benchmarks, each a function of one prediction."""
