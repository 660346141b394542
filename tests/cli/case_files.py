# SPDX-License-Identifier: Apache-2.0
"""Reads, changes and writes safetensors files, sound or damaged, and runs the program, for its tests."""
import json
import pathlib
import struct
import subprocess
import tempfile
import unittest

FORMATS = {'F16': 'e', 'F32': 'f', 'F64': 'd', 'I32': 'i', 'I64': 'q', 'U8': 'B', 'BF16': 'H'}


class Tensor:
    """Elements are numbers; those of BF16 are the 16 bits."""

    def __init__(self, dtype, shape, elements):
        self.dtype, self.shape, self.elements = dtype, list(shape), list(elements)

    def rows(self):
        """The elements along the last axis, one list for each index of the others."""
        width = self.shape[-1]
        return [self.elements[begin:begin + width] for begin in range(0, len(self.elements), width)]

    def to_bytes(self):
        return struct.pack(f'<{len(self.elements)}{FORMATS[self.dtype]}', *self.elements)


class File:
    def __init__(self, tensors, metadata):
        self.tensors, self.metadata = tensors, metadata

    def __getitem__(self, name):
        return self.tensors[name]

    def __setitem__(self, name, tensor):
        self.tensors[name] = tensor

    def names(self):
        return set(self.tensors)

    def case(self):
        return json.loads(self.metadata['case'])

    def set_case(self, **keys):
        self.metadata['case'] = json.dumps({**self.case(), **keys})

    def write(self, path):
        header = {'__metadata__': self.metadata} if self.metadata else {}
        data = b''
        for name, tensor in self.tensors.items():
            piece = tensor.to_bytes()
            header[name] = {'dtype': tensor.dtype, 'shape': tensor.shape,
                            'data_offsets': [len(data), len(data) + len(piece)]}
            data += piece
        text = json.dumps(header).encode()
        pathlib.Path(path).write_bytes(struct.pack('<Q', len(text)) + text + data)
        return path


def read(path):
    content = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8:8 + length])
    metadata = header.pop('__metadata__', {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry['data_offsets']
        piece = content[8 + length + begin:8 + length + end]
        code = FORMATS[entry['dtype']]
        elements = struct.unpack(f'<{len(piece) // struct.calcsize(code)}{code}', piece)
        tensors[name] = Tensor(entry['dtype'], entry['shape'], elements)
    return File(tensors, metadata)


def converted(tensor, dtype):
    """The same numbers in another dtype; to BF16 by cutting the lower half off."""
    if dtype == 'BF16':
        bits = (struct.unpack('<I', struct.pack('<f', x))[0] for x in tensor.elements)
        return Tensor(dtype, tensor.shape, (b >> 16 for b in bits))
    if tensor.dtype == 'BF16':
        floats = (struct.unpack('<f', struct.pack('<I', bits << 16))[0] for bits in tensor.elements)
        return Tensor(dtype, tensor.shape, floats)
    return Tensor(dtype, tensor.shape, tensor.elements)


class ProgramTest(unittest.TestCase):
    """A test with a folder of its own. Set `program` first."""
    program = None

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.output = self.folder / 'out.safetensors'

    def run_program(self, *arguments):
        return subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True, check=False)

    def select(self, path, *options):
        """What a selection that must succeed writes."""
        done = self.run_program('select', path, '-o', self.output, *options)
        self.assertEqual((done.returncode, done.stderr), (0, ''), done.stderr)
        return read(self.output)

    def write(self, file, name='case.safetensors'):
        return file.write(self.folder / name)

    def check_failure(self, done, *words):
        """A failure for bad input: a message of one line that says so, and nothing else."""
        self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
        self.assertEqual(done.stdout, '')
        self.assertTrue(done.stderr.startswith('restkv: ') and done.stderr.count('\n') == 1, done.stderr)
        for word in words:
            self.assertIn(str(word), done.stderr)
