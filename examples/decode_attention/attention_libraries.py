#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a compacted cache through the attention libraries that are installed, and compares with attention restricted to
the kept set.

    decode_attention TRACE --write cache.safetensors
    attention_libraries.py cache.safetensors [--device cpu|cuda]

Heads keep different numbers of tokens. So each KV head of each sequence is a sequence of its own for the library: one
query token, `group` query heads, one KV head. Nothing is copied or padded for that: `cu_seqlens` and the block tables
are already per head.

Needs PyTorch, safetensors and numpy. FlashAttention and FlashInfer are used where they can be imported. The exit status
is 0 when all that ran agree, 1 when one does not, 77 when PyTorch or safetensors are missing.
"""

import argparse
import dataclasses
import importlib
import inspect
import sys
import warnings

try:
    import torch
    import torch.nn.functional as functional
    from safetensors.torch import load_file
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as missing:
    print(f"attention libraries: skipped: {missing}")
    sys.exit(77)


class NotHere(Exception):
    """Why a library was not run."""


@dataclasses.dataclass
class Cache:
    """What an engine holds at a decode step. A row is one KV head of one sequence."""

    query: torch.Tensor  # [rows, group, channels]
    key: torch.Tensor  # [total_tokens, channels], ragged
    value: torch.Tensor
    cu_seqlens: torch.Tensor  # [rows + 1], int32
    key_pages: torch.Tensor  # [pages, page_size, channels]
    value_pages: torch.Tensor
    block_tables: torch.Tensor  # [rows, most_pages], int32
    lengths: torch.Tensor  # [rows], int32

    @property
    def rows(self):
        return self.query.shape[0]

    @property
    def group(self):
        return self.query.shape[1]

    @property
    def scale(self):
        return self.query.shape[2] ** -0.5

    @property
    def page_size(self):
        return self.key_pages.shape[1]

    def longest(self):
        return int(self.lengths.max())

    def to_float(self):
        names = ("query", "key", "value", "key_pages", "value_pages")
        return dataclasses.replace(self, **{name: getattr(self, name).float() for name in names})

    def with_a_mistake(self):
        """The first head ends one token too early, and the first pages of the first two heads are exchanged."""
        offsets, tables = self.cu_seqlens.clone(), self.block_tables.clone()
        offsets[1] -= 1
        tables[0, 0], tables[1, 0] = self.block_tables[1, 0], self.block_tables[0, 0]
        return dataclasses.replace(self, cu_seqlens=offsets, block_tables=tables)


def read(path, device):
    """The cache, and what is expected of it: output, and what its bound is made of, in double."""
    tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    channels = tensors["query"].shape[-1]
    rows = len(tensors["lengths"])
    cache = Cache(
        query=tensors["query"].reshape(rows, -1, channels),
        key=tensors["ragged_key"],
        value=tensors["ragged_value"],
        cu_seqlens=tensors["cu_seqlens"].int(),
        key_pages=tensors["key_pages"],
        value_pages=tensors["value_pages"],
        # Entries behind a head's pages are -1. No library should look at them; page 0 at least is one.
        block_tables=tensors["block_tables"].clamp(min=0),
        lengths=tensors["lengths"],
    )
    expected = {name: tensors[name].reshape(rows, -1, channels) for name in ("expected", "magnitude", "value_sum")}
    expected["logit_magnitude"] = tensors["logit_magnitude"].reshape(rows, -1, 1)
    return cache, expected


def bound_of(cache, expected, element):
    """How far an output may be off. As in attention.hpp for arithmetic in float: logits, weights and sums. A library
    whose elements are narrower also rounds the weights (half: with subnormals) and the output to them."""
    u = 2.0**-24
    channels = cache.query.shape[2]
    tokens = cache.lengths.double().reshape(-1, 1, 1)
    weight = torch.expm1((channels + 8) * u * expected["logit_magnitude"]) + 8 * u
    bound = (2 * weight + (4 * tokens + 8) * u) * expected["magnitude"]
    if element is not torch.float32:
        unit = torch.finfo(element).eps / 2
        subnormal = torch.finfo(element).smallest_normal * unit
        bound = 1.01 * (bound + 2 * unit * expected["magnitude"] + subnormal * expected["value_sum"])
    return bound


# What follows are the calls, one function for each: cache -> [rows, group, channels].


def sdpa_rows(backend):
    """One call for each head. Its group of query heads stands where query tokens do: they see the same keys."""

    def run(cache):
        outputs = []
        offsets = cache.cu_seqlens.tolist()
        with sdpa_kernel(backend):
            for row, (begin, end) in enumerate(zip(offsets, offsets[1:])):
                rows = (cache.query[row], cache.key[begin:end], cache.value[begin:end])
                query, key, value = (x[None, None] for x in rows)
                outputs.append(functional.scaled_dot_product_attention(query, key, value, scale=cache.scale)[0])
        return torch.cat(outputs)

    return run


def sdpa_jagged(cache):
    """All heads in one call, as jagged nested tensors."""

    def nested(values, offsets, longest):
        tensor = torch.nested.nested_tensor_from_jagged(values[:, None], offsets, min_seqlen=1, max_seqlen=longest)
        return tensor.transpose(1, 2)  # [rows, 1, ragged, channels]

    if not hasattr(torch.nested, "nested_tensor_from_jagged"):
        raise NotHere(f"PyTorch {torch.__version__} has no jagged nested tensors")
    offsets = cache.cu_seqlens.long()
    queries = torch.arange(cache.rows + 1, device=offsets.device) * cache.group
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused if cache.query.is_cuda else SDPBackend.MATH):
        output = functional.scaled_dot_product_attention(
            nested(cache.query.flatten(0, 1), queries, cache.group),
            nested(cache.key, offsets, int(offsets.diff().max())),
            nested(cache.value, offsets, int(offsets.diff().max())),
            scale=cache.scale,
        )
    return output.transpose(1, 2).values().reshape(cache.query.shape)


def sdpa_pages(cache):
    """PyTorch reads no pages on a CPU: they are gathered by the block tables, and what is behind a head is masked."""
    tables = cache.block_tables.long()
    key, value = (pages[tables].flatten(1, 2)[:, None] for pages in (cache.key_pages, cache.value_pages))
    seen = torch.arange(key.shape[2], device=key.device) < cache.lengths[:, None]
    output = functional.scaled_dot_product_attention(
        cache.query[:, None], key, value, attn_mask=seen[:, None, None], scale=cache.scale
    )
    return output[:, 0]


def single_queries(cache):
    """Offsets of one query token a row."""
    return torch.arange(cache.rows + 1, dtype=torch.int32, device=cache.query.device)


def need_gpu(cache, what):
    if not cache.query.is_cuda:
        raise NotHere(f"{what} needs a GPU")
    if cache.query.dtype not in (torch.float16, torch.bfloat16):
        raise NotHere(f"{what} takes half and bfloat16, the file holds {cache.query.dtype}")


def need_pages_of_256(cache):
    """FlashAttention 2."""
    if cache.page_size % 256 != 0:
        raise NotHere(f"it takes pages of 256 tokens or multiples, these have {cache.page_size} (--page-size)")


def torch_varlen(backend, paged):
    """PyTorch's variable-length attention, of FlashAttention or cuDNN."""

    def run(cache):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            raise NotHere(f"PyTorch {torch.__version__} has none") from None
        need_gpu(cache, "varlen_attn")
        keys, values, offsets = cache.key, cache.value, cache.cu_seqlens
        options = {"scale": cache.scale, "enable_gqa": True}
        if paged:
            keys, values = cache.key_pages, cache.value_pages
            options |= {"seqused_k": cache.lengths, "block_table": cache.block_tables}
            # FlashAttention wants the lengths' offsets beside them, cuDNN only the lengths.
            flash = backend == SDPBackend.FLASH_ATTENTION
            offsets = functional.pad(cache.lengths.cumsum(0), (1, 0)).int() if flash else None
            if flash:
                need_pages_of_256(cache)
        unknown = options.keys() - inspect.signature(varlen_attn).parameters.keys()
        if unknown:
            raise NotHere(f"PyTorch {torch.__version__}: varlen_attn takes no {', '.join(sorted(unknown))}")
        with sdpa_kernel(backend):
            return varlen_attn(
                cache.query, keys.unsqueeze(-2), values.unsqueeze(-2), single_queries(cache), offsets, 1,
                max(cache.longest(), int(cache.cu_seqlens.diff().max())), **options)

    return run


def flash_attention(name, paged):
    """FlashAttention 2 (flash_attn) and 3 (flash_attn_interface)."""

    def run(cache):
        library = optional(name)
        need_gpu(cache, name)
        if not paged:
            output = library.flash_attn_varlen_func(
                cache.query, cache.key[:, None], cache.value[:, None], single_queries(cache), cache.cu_seqlens, 1,
                int(cache.cu_seqlens.diff().max()), softmax_scale=cache.scale)
        else:
            if name == "flash_attn":
                need_pages_of_256(cache)
            tables = {"block_table" if name == "flash_attn" else "page_table": cache.block_tables}
            output = library.flash_attn_with_kvcache(
                cache.query[:, None], cache.key_pages[:, :, None], cache.value_pages[:, :, None],
                cache_seqlens=cache.lengths, softmax_scale=cache.scale, **tables)
        return (output[0] if isinstance(output, tuple) else output).reshape(cache.query.shape)

    return run


def flashinfer_ragged(cache):
    library = optional("flashinfer")
    need_gpu(cache, "FlashInfer")
    wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(flashinfer_workspace(cache), "NHD")
    wrapper.plan(
        single_queries(cache), cache.cu_seqlens, cache.group, 1, cache.query.shape[2], causal=False,
        sm_scale=cache.scale, q_data_type=cache.query.dtype, kv_data_type=cache.key.dtype)
    return wrapper.run(cache.query, cache.key[:, None], cache.value[:, None])


def flashinfer_paged(cache):
    library = optional("flashinfer")
    need_gpu(cache, "FlashInfer")
    # It wants the pages of all rows one behind the other, and how many tokens the last page of each has.
    pages = (cache.lengths + cache.page_size - 1) // cache.page_size
    used = torch.arange(cache.block_tables.shape[1], device=pages.device) < pages[:, None]
    starts = functional.pad(pages.cumsum(0), (1, 0)).int()
    last = (cache.lengths - (pages - 1) * cache.page_size).int()
    # Tensor cores: any number of query heads to a KV head.
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(flashinfer_workspace(cache), "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts, cache.block_tables[used].contiguous(), last, cache.group, 1, cache.query.shape[2], cache.page_size,
        sm_scale=cache.scale, q_data_type=cache.query.dtype, kv_data_type=cache.key.dtype)
    return wrapper.run(cache.query, (cache.key_pages[:, :, None], cache.value_pages[:, :, None]))


def flashinfer_workspace(cache):
    return torch.zeros(128 * 1024 * 1024, dtype=torch.uint8, device=cache.query.device)


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise NotHere(f"not installed: {missing}") from None


def calls(device):
    """(name, run, whether it is given float: kernels that hold logits in the elements' type cannot keep the bound)"""
    backends = {"math": (SDPBackend.MATH, True), "flash": (SDPBackend.FLASH_ATTENTION, False),
                "efficient": (SDPBackend.EFFICIENT_ATTENTION, False)}
    if hasattr(SDPBackend, "CUDNN_ATTENTION"):
        backends["cuDNN"] = (SDPBackend.CUDNN_ATTENTION, False)
    for name, (backend, wide) in backends.items():
        yield f"PyTorch sdpa, {name}, a call a head", sdpa_rows(backend), wide
    yield "PyTorch sdpa, jagged", sdpa_jagged, device == "cpu"
    yield "PyTorch sdpa, gathered pages", sdpa_pages, True
    for name in ("flash", "cuDNN"):
        for paged in (False, True):
            if name in backends:
                yield f"PyTorch varlen_attn, {name}, {layout(paged)}", torch_varlen(backends[name][0], paged), False
    for name in ("flash_attn", "flash_attn_interface"):
        for paged in (False, True):
            yield f"{name}, {layout(paged)}", flash_attention(name, paged), False
    yield "flashinfer, ragged", flashinfer_ragged, False
    yield "flashinfer, paged", flashinfer_paged, False


def layout(paged):
    return "paged" if paged else "ragged"


def compare(output, expected, bound):
    """Largest difference, and the largest as a part of its bound; infinite for what is not a number."""
    off = (output.double() - expected["expected"]).abs()
    part = torch.where(off == 0, 0, off / bound)
    return tuple(float(torch.where(x.isnan(), torch.inf, x).max()) for x in (off, part))


def refused(problem):
    """Whether a library says that it has no kernel for this machine or this input, rather than going wrong."""
    words = ("No viable backend", "No available kernel", "constraints are not satisfied", "only supports")
    return isinstance(problem, NotImplementedError) or any(word in str(problem) for word in words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="what decode_attention --write wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")

    cache, expected = read(chosen.file, chosen.device)
    device = torch.cuda.get_device_name() if chosen.device == "cuda" else "the CPU"
    print(f"PyTorch {torch.__version__} on {device}, {cache.query.dtype}: {cache.rows} heads of "
          f"{int(cache.lengths.min())} to {cache.longest()} tokens, pages of {cache.page_size}")
    ran = failed = 0
    for name, run, wide in calls(chosen.device):
        given = cache.to_float() if wide else cache
        try:
            with torch.no_grad():
                output, wrong = run(given), run(given.with_a_mistake())
        except NotHere as reason:
            print(f"  {name:<38} not run: {reason}")
            continue
        except Exception as problem:  # whatever a library throws is its answer
            verdict = "not run" if refused(problem) else "FAIL"
            print(f"  {name:<38} {verdict}: {type(problem).__name__}: {' '.join(str(problem).split())[:160]}")
            failed += verdict == "FAIL"
            continue
        ran += 1
        bound = bound_of(given, expected, given.query.dtype)
        largest, part = compare(output, expected, bound)
        _, mistake = compare(wrong, expected, bound)
        ok = part <= 1 < mistake
        failed += not ok
        print(f"  {name:<38} off by {largest:.2e}, {part:.4f} of its bound; with a mistake {mistake:.3g} of it   "
              f"{'ok' if ok else 'FAIL'}")
    print(f"{ran} ran, {failed} failed")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
