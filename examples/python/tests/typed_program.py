# SPDX-License-Identifier: Apache-2.0
"""What a type checker is to accept; test_typing.py runs one over it."""

import numpy as np
import restkv
from typing_extensions import assert_type

key = np.zeros((1, 2, 50, 8), np.float32)
policy = restkv.policy("snap_kv", 20, window=8, kernel=5)
assert_type(policy.keys(), dict[str, bool | int | float | str])
assert_type(policy.replace(budget=10), restkv.Policy)
assert_type(policy.needs, tuple[str, ...])
kept = restkv.select(policy, key, key, None, lengths=np.array([50]), padding="left")
assert_type(kept, restkv.Kept)
assert_type(kept.capacity, int)
packed = restkv.compact(kept, key, key, layout="ragged")
errors = restkv.output_error(kept, key, key, key, metric=restkv.Metric(np.ones((3, 16), np.float32), 2))
assert_type(errors.mean_relative(), float)
session = restkv.Session(policy, layers=1, query_heads=2, kv_heads=2, head_dim=8)
session.append(0, key[0], key[0], key[0])
assert_type(session.room(0), int)
try:
    restkv.policy("unknown")
except restkv.Error as error:
    print(error.code, [row for row in kept], packed)
