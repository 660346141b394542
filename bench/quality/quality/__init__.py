# SPDX-License-Identifier: Apache-2.0
"""Quality benchmarks: what a model still answers right after eviction."""
