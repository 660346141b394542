# SPDX-License-Identifier: Apache-2.0
"""Reads safetensors files, and writes small traces, sound or damaged, for the tests of `restkv compare`."""
import json
import random
import struct

FORMATS = {'F16': 'e', 'F32': 'f', 'I32': 'i'}


def read_header(path):
    with open(path, 'rb') as file:
        (length,) = struct.unpack('<Q', file.read(8))
        return json.loads(file.read(length))


class Tensor:
    def __init__(self, shape, elements, dtype='F16'):
        self.shape, self.elements, self.dtype = list(shape), list(elements), dtype

    def to_bytes(self):
        return struct.pack(f'<{len(self.elements)}{FORMATS[self.dtype]}', *self.elements)


def write(path, tensors, metadata=None):
    header = {'__metadata__': metadata} if metadata else {}
    data = b''
    for name, tensor in tensors.items():
        piece = tensor.to_bytes()
        header[name] = {'dtype': tensor.dtype, 'shape': tensor.shape, 'data_offsets': [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text + data)


def small_trace(layers=(0, 3), query_heads=4, kv_heads=2, tokens=96, window=40, future=5, head_dim=8, hidden=12, seed=1):
    """The tensors of a trace of random numbers, by name."""
    source = random.Random(seed)

    def tensor(*shape):
        count = 1
        for extent in shape:
            count *= extent
        return Tensor(shape, (source.gauss(0, 1) for _ in range(count)))

    tensors = {}
    for layer in layers:
        prefix = f'layers.{layer}.'
        tensors[prefix + 'q'] = tensor(query_heads, window, head_dim)
        tensors[prefix + 'k'] = tensor(kv_heads, tokens, head_dim)
        tensors[prefix + 'v'] = tensor(kv_heads, tokens, head_dim)
        tensors[prefix + 'wo'] = tensor(hidden, query_heads * head_dim)
        tensors[prefix + 'q_future'] = tensor(query_heads, future, head_dim)
        tensors[prefix + 'k_future'] = tensor(kv_heads, future, head_dim)
        tensors[prefix + 'v_future'] = tensor(kv_heads, future, head_dim)
    return tensors
