"""The instructions of `lora_jax.kernels.thread` on numpy arrays of 32 lanes.

It runs a kernel's body warp by warp, each up to where threads wait for each
other, after the PTX manual: fragments of `mma.m16n8k16` (section 9.7.15),
`prmt`'s default mode, alignment of vector accesses. An access outside an array
or a read of shared memory that nobody wrote raises.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

LANES = 32
POISON = np.uint32(0x7FFFFFFF)  # A NaN, as two halves too.
KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


class Warp:
  """One warp: `Thread`'s methods, of 32 lanes at once."""

  def __init__(self, number, arrays, places, peers, rank, indices):
    self._number = number
    self._arrays = arrays  # uint8 of device memory by name.
    self._start = dict.fromkeys(arrays, 0)
    self._places = places  # Of shared arrays by name.
    # Words of shared memory of each block of the cluster, and which of them
    # were written.
    self._peers, self._rank = peers, rank
    self._indices = indices

  def _int(self, x):
    if isinstance(x, int):
      return np.full(LANES, x & 0xFFFFFFFF, np.uint32)
    assert x.dtype == np.uint32 and x.shape == (LANES,), x
    return x

  def _float(self, x):
    assert x.dtype == np.float32 and x.shape == (LANES,), x
    return x

  def index(self, name):
    return self._int(self._indices[name])

  def thread(self):
    return np.arange(LANES, dtype=np.uint32) + np.uint32(LANES * self._number)

  def add(self, a, b):
    return self._int(a) + self._int(b)

  def mul(self, a, b):
    return self._int(a) * self._int(b)

  def divide(self, a, b):
    return self._int(a) // np.uint32(b)

  def minimum(self, a, b):
    return np.minimum(self._int(a), self._int(b))

  def both(self, a, b):
    return self._int(a) & self._int(b)

  def either(self, a, b):
    return self._int(a) | self._int(b)

  def left(self, a, bits):
    return self._int(a) << np.uint32(bits)

  def right(self, a, bits):
    return self._int(a) >> np.uint32(bits)

  def less(self, a, b):
    return (self._int(a) < self._int(b)).astype(np.uint32)

  def same(self, a, b):
    return (self._int(a) == self._int(b)).astype(np.uint32)

  def permute(self, a, b, selector):
    a, b, selector = map(self._int, (a, b, selector))
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(LANES, np.uint32)
    for n in range(4):
      pick = selector >> np.uint32(4 * n) & np.uint32(15)
      assert (pick < 8).all(), "replicates a sign"
      byte = both >> (8 * pick).astype(np.uint64) & np.uint64(255)
      out |= byte.astype(np.uint32) << np.uint32(8 * n)
    return out

  def float(self, bits):
    if isinstance(bits, float):
      return np.full(LANES, bits, np.float32)
    return self._int(bits).view(np.float32)

  def bits(self, x):
    return self._float(x).view(np.uint32)

  def sum(self, a, b):
    return self._float(a) + self._float(b)

  def product(self, a, b):
    return self._float(a) * self._float(b)

  def fma(self, a, b, c):
    wide = [self._float(x).astype(np.float64) for x in (a, b, c)]
    return (wide[0] * wide[1] + wide[2]).astype(np.float32)

  def mma(self, a, b, c, kind):
    def halves(registers):  # [element, lane]
      return np.stack([
          self._int(r).view(KINDS[kind]).reshape(LANES, 2)[:, n]
          for r in registers for n in (0, 1)]).astype(np.float32)

    group, within = np.arange(LANES) // 4, np.arange(LANES) % 4
    left = np.full((16, 16), np.nan, np.float32)
    right = np.full((16, 8), np.nan, np.float32)
    for i, value in enumerate(halves(a)):
      row = group if i < 2 or 4 <= i < 6 else group + 8
      left[row, within * 2 + (i & 1) + (8 if i >= 4 else 0)] = value
    for i, value in enumerate(halves(b)):
      right[within * 2 + (i & 1) + (8 if i >= 2 else 0), group] = value
    product = left @ right
    return [self._float(c[i]) + product[
        group if i < 2 else group + 8, within * 2 + (i & 1)]
            for i in range(4)]

  def advance(self, name, index, stride):
    number, = set(self._int(index).tolist())
    self._start[name] += number * stride

  def load(self, name, offset, words, *, where=1, once=False):
    del once
    there = self._int(where) != 0
    at = self._int(offset).astype(np.int64) + self._start[name]
    assert (at[there] % (4 * words) == 0).all(), "not aligned"
    memory = self._arrays[name].reshape(-1).view(np.uint32)
    assert (at[there] + 4 * words <= 4 * memory.size).all(), "outside"
    at = np.where(there, at // 4, 0)
    return [np.where(there, memory[at + n], POISON) for n in range(words)]

  def store(self, name, offset, value, kind, *, where):
    there = self._int(where) != 0
    size = 4 if kind == "f32" else 2
    at = self._int(offset).astype(np.int64) + self._start[name]
    assert (at[there] % size == 0).all()
    memory = self._arrays[name].reshape(-1).view(KINDS[kind])
    memory[at[there] // size] = self._float(value).astype(KINDS[kind])[there]

  def shared_at(self, name, offset):
    return self._int(self._places[name]) + self._int(offset)

  def _words(self, at, words):
    at = self._int(at).astype(np.int64)
    assert (at % (4 * words) == 0).all(), "not aligned"
    return [at // 4 + n for n in range(words)]

  def shared_load(self, at, words, *, constant=False):
    del constant
    memory, written = self._peers[self._rank]
    at = self._words(at, words)
    assert all(written[n].all() for n in at)
    return [memory[n] for n in at]

  def shared_store(self, at, values):
    memory, written = self._peers[self._rank]
    for n, value in zip(self._words(at, len(values)), values, strict=True):
      memory[n], written[n] = self._int(value), True

  def peer_load(self, at, rank, *, where):
    memory, written = self._peers[rank]
    there = self._int(where) != 0
    at, = self._words(at, 1)
    assert written[at][there].all()
    return np.where(there, memory[at], POISON)

  def order(self):
    pass

  def loop(self, start, stop, step, carry, body):
    (start,), (stop,) = ({*self._int(x).tolist()} for x in (start, stop))
    carry = list(carry)
    for n in range(start, stop, step):
      carry = body(self._int(n), carry)
    return carry


def run(body, arrays, shared, grid, cluster, warps=4) -> None:
  """Runs a kernel; `arrays` are written in place.

  Args:
    body: a generator function of a `Warp`.
    arrays: uint8 by name.
    shared: words of shared memory by name.
    grid: size of each axis by name.
    cluster: the axis of `grid` whose blocks see each other's memory, or None.
    warps: of a block.
  """
  outer = {name: n for name, n in grid.items() if name != cluster}
  inner = grid.get(cluster, 1)
  # Away from zero, as real ones are.
  ends = list(itertools.accumulate(shared.values(), initial=256))
  places = {name: 4 * at for name, at in zip(shared, ends)}
  for place in itertools.product(*map(range, outer.values())):
    peers = [(np.zeros(ends[-1], np.uint32), np.zeros(ends[-1], bool))
             for _ in range(inner)]
    running = []
    for rank in range(inner):
      indices = dict(zip(outer, place, strict=True))
      if cluster is not None:
        indices[cluster] = rank
      running += [body(Warp(n, arrays, places, peers, rank, indices))
                  for n in range(warps)]
    while running:
      at = [next(generator, None) for generator in running]
      assert len(set(at)) == 1, "some threads wait where others do not"
      if at[0] is None:
        break
