# SPDX-License-Identifier: Apache-2.0
"""restkv for Hugging Face transformers.

    import restkv
    from restkv.transformers import RestKVCache

    cache = RestKVCache(restkv.policy("standard", budget=512), model)
    model.generate(**inputs, past_key_values=cache)

Works with every model whose attention goes through transformers' `AttentionInterface`. Nothing is patched: the cache is
a `Cache`, and the attention functions "restkv" are registered when this package is imported.
"""

from .attention import attach, register
from .cache import RestKVCache
from .layer import RestKVLayer
from .projections import forget_metrics

register()

__all__ = ["RestKVCache", "RestKVLayer", "attach", "forget_metrics", "register"]
