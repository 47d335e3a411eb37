"""What a warp does in the product of few rows and a 4-bit weight on Hopper.

A warp multiplies 32 byte rows (64 weight rows) of 8 `width` columns by tensor
cores, with the weight as the left operand of `mma.m16n8k16`: 16 columns by 16
rows of weight, times 8 rows of `x`, so that 1 row costs what 8 do. The order
of the sum is free, so that nothing is transposed: a byte's two codes, rows `r`
and `r + n / 2` of a block, are the two halves of one register of the operand,
and a lane's neighbouring byte rows meet neighbouring elements of `x`.

A byte becomes such a register by one read of a table of 256 in shared memory,
which every lane has in banks of its own (`decode="lut"`), or four codes by
eight byte permutations (`"prmt"`). Where the levels are not exact in 16 bits,
the table has two terms, a level and what its rounding left: 16 bits of
mantissa in bfloat16. Scales multiply the sum of a block, not each weight.

Four warps share columns and take chunks of rows in turn; `splits` such blocks
share columns as well, and add their sums over the cluster's shared memory
(`cluster`), or leave them to XLA. Either order is fixed: the same bits each
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import numpy as np

from lora_jax.kernels import decode as decode_lib
from lora_jax.kernels import thread as thread_lib

WARPS = 4
CHUNK = 32  # Byte rows: 4 lanes by 8.
NESTED = 256  # Scales of one `nested_absmax`.
KINDS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What may be tuned.

  Attributes:
    width: neighbouring columns of a lane, 4, 8 or 16; a warp has 8 times that.
    splits: blocks that share columns; at most 8 in a cluster.
    cluster: whether these add their sums themselves.
    decode: `"lut"` or `"prmt"`.
    terms: 16-bit numbers that a level is a sum of, 1 or 2.
    ahead: chunks whose bytes are on their way while one is multiplied.
  """

  width: int = 16
  splits: int = 4
  cluster: bool = True
  decode: str = "lut"
  terms: int = 2
  ahead: int = 1


def levels_in_terms(
    levels: decode_lib.Levels, dtype: Any
) -> tuple[np.ndarray, float]:
  """`[terms, 16]` in `dtype` and a unit: `levels = sum(terms) * unit`.

  `(-8, ..., 7)` -> `[[-8, ..., 7]]`, 1.0: one term where that is exact, or
  differs from a multiple of the least level by its own rounding; else two.
  """
  exact = np.asarray(levels, np.float64)
  unit = float(np.abs(exact[exact != 0]).min())
  whole = np.round(exact / unit)
  if (np.abs(whole * unit - exact) <= 2.0**-23 * np.abs(exact)).all() and (
      whole.astype(dtype).astype(np.float64) == whole).all():
    return whole.astype(dtype)[None], unit
  first = exact.astype(dtype)
  rest = (exact - first.astype(np.float64)).astype(dtype)
  return np.stack([first, rest]), 1.0


@dataclasses.dataclass(frozen=True)
class Body:
  """The kernel of one thread; see the module for its order of things.

  Attributes:
    plan: how.
    rows: of `x`.
    in_features: of the weight.
    columns: of the weight.
    block_size: rows of a block.
    kind: of `x`, `"bf16"` or `"f16"`.
    out: of the result, the same or `"f32"`.
    terms: `[terms, 16]` 16-bit levels.
    unit: what they are multiples of.
    minimums: whether blocks have some.
    nested: whether scales are in 8 bits (`double.Nested`, without minimums).
  """

  plan: Plan
  rows: int
  in_features: int
  columns: int
  block_size: int
  kind: str
  out: str
  terms: np.ndarray
  unit: float
  minimums: bool = False
  nested: bool = False

  @property
  def groups(self) -> int:
    """Of 8 rows of `x`."""
    return -(-self.rows // 8)

  @property
  def late(self) -> bool:
    """Whether `x` is loaded when it is needed: it is in the cache, and no
    registers are left for that of the chunks ahead (255 a thread)."""
    return self.groups > 1 or self.nested

  @property
  def span(self) -> int:
    """Columns of a warp."""
    return 8 * self.plan.width

  @property
  def statistics(self) -> tuple[str, ...]:
    return ("scales", "minimums") if self.minimums else ("scales",)

  @property
  def blocks(self) -> int:
    return self.in_features // self.block_size

  @property
  def arrays(self) -> tuple[str, ...]:
    """In device memory, in the order of the kernel's operands."""
    more = ("absmax", "offset", "map") if self.nested else ()
    return ("x", "codes", *self.statistics, *more, "out")

  @property
  def shared(self) -> dict[str, int]:
    """Words of shared memory."""
    return {**({"lut": 256 * 32} if self.plan.decode == "lut" else {}),
            **({"map": 256} if self.nested else {}),
            "sums": WARPS * 8 * self.groups * self.span}

  @property
  def apart(self) -> bool:
    """Whether the splits' sums are left to XLA."""
    return self.plan.splits > 1 and not self.plan.cluster

  def __call__(self, op: Any) -> Iterator[str]:
    plan, out_size = self.plan, 4 if self.out == "f32" else 2
    thread = op.thread()
    warp, lane = op.right(thread, 5), op.both(thread, 31)
    # A lane's place in the operands, as the manual has it.
    group, quarter = op.right(lane, 2), op.both(lane, 3)
    layer, split = op.index("layer"), op.index("split")
    op.advance("x", layer, self.rows * self.in_features * 2)
    op.advance("codes", layer, self.in_features * self.columns // 2)
    count = self.blocks * self.columns
    for name in self.statistics:
      op.advance(name, layer, count if self.nested else 4 * count)
    if self.nested:
      op.advance("absmax", layer, -(-count // NESTED) * 4)
      op.advance("offset", layer, 4)
    first = self.rows * self.columns * out_size
    if plan.splits > 1 and not plan.cluster:
      layer = op.add(op.mul(layer, plan.splits), split)
    op.advance("out", layer, first)
    # The last tile ends with the row, and repeats some of its neighbour.
    tile = op.minimum(
        op.mul(op.index("tile"), self.span), self.columns - self.span)
    column = op.add(tile, op.mul(group, plan.width))

    chunks = self.in_features // (2 * CHUNK)
    each = -(-chunks // plan.splits)
    start = op.add(op.mul(split, each), warp)
    stop = op.minimum(op.mul(op.add(split, 1), each), chunks)
    ahead = [
        self._load(op, op.add(start, WARPS * n), stop, column, group, quarter)
        for n in range(plan.ahead)]
    lookup = self._fill(op, warp, lane)
    unnest = self._unnest(op, thread) if self.nested else None
    yield thread_lib.BLOCK

    sums = self.groups * plan.width * 2
    size = len(ahead[0])

    def step(chunk, carry):
      now, later = carry[sums:][:size], carry[sums + size:]
      if self.late:
        codes = 2 * plan.width
        now[codes:codes] = self._load_x(op, chunk, 1, group, quarter)
      far = self._load(op, op.add(chunk, WARPS * plan.ahead), stop, column,
                       group, quarter)
      op.order()
      added = self._multiply(op, lookup, unnest, now, carry[:sums])
      return [*added, *later, *far]

    done = op.loop(start, stop, WARPS,
                   [*[op.float(0.0)] * sums,
                    *[word for stage in ahead for word in stage]], step)
    self._leave(op, warp, group, quarter, done[:sums])
    yield thread_lib.BLOCK
    yield from self._finish(op, thread, tile, split, out_size)

  def _load(self, op, chunk, stop, column, group, quarter) -> list:
    """A chunk's registers, anything past the end: 8 byte rows of a lane's
    columns, `x` unless that is `late`, the columns' statistics."""
    plan = self.plan
    there = op.less(chunk, stop)
    block, row = self._place(op, chunk, quarter)
    at = op.add(op.mul(row, self.columns), column)
    found = []
    for n in range(8):
      found += self._words(op, "codes", op.add(at, n * self.columns),
                           plan.width // 4, there, True)
    if not self.late:
      found += self._load_x(op, chunk, there, group, quarter)
    at = op.add(op.mul(block, self.columns), column)
    if self.nested:
      found += self._words(op, "scales", at, plan.width // 4, there)
      for n in range(plan.width):  # Number `o * q + block` of all.
        number = op.add(op.mul(op.add(column, n), self.blocks), block)
        found += op.load(
            "absmax", op.left(op.divide(number, NESTED), 2), 1, where=there)
      return found
    for name in self.statistics:
      found += self._words(op, name, op.left(at, 2), plan.width, there)
    return found

  def _place(self, op, chunk, quarter) -> tuple[Any, Any]:
    """The block of a chunk and a lane's first byte row."""
    row = op.add(op.mul(chunk, CHUNK), op.mul(quarter, 8))
    return op.divide(chunk, self.block_size // (2 * CHUNK)), row

  def _load_x(self, op, chunk, there, group, quarter) -> list:
    """A lane's 16 elements of each group of `x`."""
    block, row = self._place(op, chunk, quarter)
    # Low nibbles are a chunk of the block's first half, high ones of the other.
    within = op.add(row, op.mul(block, self.block_size // 2))
    found = []
    for n in range(self.groups):
      of = op.minimum(op.add(group, 8 * n), self.rows - 1)
      at = op.left(op.add(op.mul(of, self.in_features), within), 1)
      for half in (0, self.block_size):  # Half a block of two bytes each.
        found += self._words(op, "x", op.add(at, half), 4, there)
    return found

  def _words(self, op, name, at, words, there, once=False) -> list:
    most = min(words, 4)
    return [w for n in range(0, words, most) for w in op.load(
        name, op.add(at, 4 * n), most, where=there, once=once)]

  def _fill(self, op, warp, lane):
    """Makes the table; returns what decodes words of 4 columns to registers
    `[column][term]`."""
    permuted = self._permutations(op)
    if self.plan.decode == "prmt":
      return permuted
    count = len(self.terms)
    first = op.add(op.mul(warp, 64), op.mul(op.right(lane, 3), 16))
    for n in range(0, 16, 4):  # A quarter warp has an entry of 128 bytes.
      entry = op.add(first, n)
      words = permuted(op.add(op.mul(entry, 0x01010101), 0x03020100))
      for m, terms in enumerate(words):
        at = op.add(op.mul(op.add(entry, m), 128),
                    op.left(op.both(lane, 7), 4))
        op.shared_store(op.shared_at("lut", at), terms * (4 // count))
    mine = op.mul(op.both(lane, 32 // count - 1), 4 * count)

    def lookup(word):
      # After the wait, which is when the place is known.
      place = op.shared_at("lut", mine)
      found = []
      for byte in range(4):
        alone = op.permute(word, 0, 0x4440 + byte)
        found.append(op.shared_load(
            op.add(op.mul(alone, 128), place), count, constant=True))
      return found

    return lookup

  def _unnest(self, op, thread):
    """Brings the map of 8 bits; returns what decodes scales, as
    `double.Nested.dequantize` does, and as exactly."""
    words = op.load("map", op.left(thread, 3), 2)
    op.shared_store(op.shared_at("map", op.left(thread, 3)), words)
    offset = op.float(op.load("offset", 0, 1)[0])

    def unnest(codes, absmax):
      found = []
      for n, most in enumerate(absmax):
        alone = op.permute(codes[n // 4], 0, 0x4440 + n % 4)
        value, = op.shared_load(
            op.shared_at("map", op.left(alone, 2)), 1, constant=True)
        product = op.product(op.float(value), op.float(most))
        found.append(op.sum(product, offset))
      return found

    return unnest

  def _permutations(self, op):
    """Four codes at once: eight levels a permutation, of their low bytes and
    of their high ones, and the right one of two eights."""
    parts = [[[int.from_bytes(bytes(int(v) >> shift & 255
                                    for v in level[n:n + 4]), "little")
               for n in range(0, 16, 4)] for shift in (0, 8)]
             for level in self.terms.view(np.uint16)]

    def lookup(word):
      found: list[list[Any]] = [[] for _ in range(4)]
      three = op.both(word, 0x77777777)
      pick = op.either(op.both(op.right(word, 1), 0x44444444), 0x32103210)
      for half in (0, 1):
        code, which = (three, pick) if not half else (
            op.right(three, 16), op.right(pick, 16))
        for term in parts:
          low, high = (
              op.permute(op.permute(a, b, code), op.permute(c, d, code), which)
              for a, b, c, d in term)
          found[2 * half].append(op.permute(low, high, 0x5140))
          found[2 * half + 1].append(op.permute(low, high, 0x7362))
      return found

    return lookup

  def _multiply(self, op, lookup, unnest, stage, sums) -> list:
    """`sums` `[group][column][2]` and what a chunk adds to them."""
    plan = self.plan
    words = plan.width // 4
    codes, rest = stage[:8 * words], stage[8 * words:]
    x, rest = rest[:8 * self.groups], rest[8 * self.groups:]
    if unnest:
      scales, rest = unnest(rest[:words], rest[words:]), []
    else:
      scales = [op.float(s) for s in rest[:plan.width]]
    if self.unit != 1:
      scales = [op.product(s, op.float(self.unit)) for s in scales]
    minimums = [op.float(s) for s in rest[plan.width:]]
    pairs = []  # Of each group, rows r and r + n / 2, for 8 r.
    for n in range(self.groups):
      low, high = x[8 * n:][:4], x[8 * n + 4:][:4]
      pairs.append([op.permute(a, b, which)
                    for a, b in zip(low, high, strict=True)
                    for which in (0x5410, 0x7632)])
    zeros = [op.float(0.0)] * 4
    if minimums:  # The sum of `x` is a product with ones.
      one = int(np.ones((), self.terms.dtype).view(np.uint16))
      one |= one << 16
      totals = []
      for pair in pairs:
        total = zeros
        for k in range(0, 8, 2):
          total = op.mma([one] * 4, pair[k:k + 2], total, self.kind)
        totals.append(total)
    added = list(sums)
    for word in range(words):
      decoded = [lookup(codes[n * words + word]) for n in range(8)]
      for tile in range(0, 4, 3 - len(self.terms)):
        # Columns `group` and `group + 8` of the operand: neighbours, or the
        # two terms of one, which a read of the table leaves side by side.
        for n, pair in enumerate(pairs):
          part = zeros
          for k in range(0, 8, 2):
            part = op.mma(
                [term for byte in decoded[k:k + 2]
                 for column in byte[tile:tile + 3 - len(self.terms)]
                 for term in column],
                pair[k:k + 2], part, self.kind)
          if len(self.terms) == 2:
            part = [op.sum(a, b) for a, b in zip(part[:2], part[2:])]
          for m, value in enumerate(part):
            of = 4 * word + tile + m // 2
            at = (n * plan.width + of) * 2 + m % 2
            added[at] = op.fma(value, scales[of], added[at])
            if minimums:
              added[at] = op.fma(totals[n][m % 2], minimums[of], added[at])
    return added

  def _leave(self, op, warp, group, quarter, sums) -> None:
    """A warp's sums in shared memory, `[warp, row of x, column]`."""
    plan = self.plan
    rows = 8 * self.groups
    for n in range(self.groups):
      for odd in (0, 1):
        row = op.add(op.mul(quarter, 2), 8 * n + odd)
        row = op.add(op.mul(warp, rows), row)
        for word in range(plan.width // 4):
          at = (n * plan.width + 4 * word) * 2 + odd
          column = op.add(op.mul(group, plan.width), 4 * word)
          place = op.left(op.add(op.mul(row, self.span), column), 2)
          op.shared_store(op.shared_at("sums", place), [
              op.bits(sums[at + m]) for m in (0, 2, 4, 6)])

  def _finish(self, op, thread, tile, split, out_size) -> Iterator[str]:
    """The sum over warps, and over blocks if they are to; a column a thread."""
    plan = self.plan
    step = 8 * self.groups * self.span * 4
    together = plan.cluster and plan.splits > 1
    places = []
    for n in range(-(-self.rows * self.span // (32 * WARPS))):
      place = op.add(thread, 32 * WARPS * n)
      row = op.divide(place, self.span)
      at = op.shared_at("sums", op.left(place, 2))
      parts = [op.float(op.shared_load(op.add(at, w * step), 1)[0])
               for w in range(WARPS)]
      total = _total(op, parts)
      places.append((n, row, place, at))
      if together:
        op.shared_store(at, [op.bits(total)])
      else:
        self._store(op, row, place, tile, out_size, total,
                    op.less(row, self.rows))
    if not together:
      return
    yield thread_lib.CLUSTER
    for n, row, place, at in places:
      mine = op.both(op.same(split, n % plan.splits),
                     op.less(row, self.rows))
      parts = [op.float(op.peer_load(at, rank, where=mine))
               for rank in range(plan.splits)]
      self._store(op, row, place, tile, out_size, _total(op, parts), mine)
    yield thread_lib.CLUSTER  # Its memory must outlast its readers.

  def _store(self, op, row, place, tile, size, value, where) -> None:
    column = op.add(op.both(place, self.span - 1), tile)
    at = op.mul(op.add(op.mul(row, self.columns), column), size)
    op.store("out", at, value, self.out, where=where)


def _total(op: Any, parts: Sequence[Any]) -> Any:
  total = parts[0]
  for part in parts[1:]:
    total = op.sum(total, part)
  return total
