"""Instructions of one GPU thread, for kernels that need exactly those.

`Thread` writes them into a Mosaic GPU kernel (inside `plgpu.inline_mgpu`). A
kernel's body is a Python generator over its methods and yields where threads
wait for each other, so that a test can run the very same body on numpy arrays
of 32 lanes (`tests/kernels/warps.py`).

Registers are 32 bits: integers, or float32 where a method says so. Python
numbers are constants. Offsets are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as typed_arith
from jaxlib.mlir.dialects import llvm as typed_llvm
from jaxlib.mlir.dialects import scf as typed_scf

# The stubs know the generated half of these modules only.
arith: Any = typed_arith
llvm: Any = typed_llvm
scf: Any = typed_scf

Register: TypeAlias = Any
# What a body yields: who waits for whom.
BLOCK, CLUSTER = "block", "cluster"
_GLOBAL = 1  # LLVM's number of the address space.


class Thread:
  """Emits instructions at MLIR's insertion point."""

  def __init__(self, arrays: dict[str, ir.Value], shared: dict[str, ir.Value],
               indices: dict[str, ir.Value]):
    """`arrays` in device memory and `shared` memory by name, and the block's
    `indices` in the grid."""
    self._i32 = ir.IntegerType.get_signless(32)
    self._i64 = ir.IntegerType.get_signless(64)
    self._f32 = ir.F32Type.get()
    self._at = {name: self._address(ref) for name, ref in arrays.items()}
    self._shared = {
        name: llvm.ptrtoint(self._i32, mgpu.utils.memref_ptr(ref))
        for name, ref in shared.items()}
    self._indices = indices

  def _address(self, ref: ir.Value) -> ir.Value:
    pointer = mgpu.utils.memref_ptr(ref)
    # A pointer to shared memory would compile, to an address of anything.
    if llvm.PointerType(pointer.type).address_space not in (0, _GLOBAL):
      raise ValueError(f"not in device memory: {ref.type}")
    there = llvm.PointerType.get(_GLOBAL)
    return llvm.ptrtoint(self._i64, llvm.addrspacecast(there, pointer))

  def _int(self, x: Register) -> ir.Value:
    if isinstance(x, int):
      # As the signed number of the same bits.
      return arith.constant(self._i32, (x & 0xFFFFFFFF ^ 1 << 31) - (1 << 31))
    return x

  def _asm(self, results: Sequence[ir.Type], operands: Sequence[ir.Value],
           text: str, *, effects: bool = False,
           together: bool = False) -> list[ir.Value]:
    """`together`: the threads of a warp execute it as one."""
    kinds = {self._i32: "r", self._i64: "l", self._f32: "f"}
    constraints = [f"={kinds[t]}" for t in results]
    constraints += [kinds[x.type] for x in operands]
    kind = (ir.Type.parse("!llvm.void") if not results else results[0]
            if len(results) == 1 else llvm.StructType.get_literal([*results]))
    more: dict[str, Any] = {}
    if hasattr(llvm.InlineAsmOp, "convergent"):  # jax 0.11.
      more["convergent"] = together
    found = llvm.inline_asm(
        kind, [*operands], text, ",".join(constraints),
        has_side_effects=effects, **more)
    if len(results) < 2:
      return [found] if results else []
    return [llvm.extractvalue(t, found, [n]) for n, t in enumerate(results)]

  # Where this thread is.

  def index(self, name: str) -> Register:
    return self._indices[name]

  def thread(self) -> Register:
    """Its number in the block."""
    return self._asm([self._i32], [], "mov.u32 $0, %tid.x;")[0]

  # Integers, unsigned.

  def add(self, a: Register, b: Register) -> Register:
    return arith.addi(self._int(a), self._int(b))

  def mul(self, a: Register, b: Register) -> Register:
    return arith.muli(self._int(a), self._int(b))

  def divide(self, a: Register, b: int) -> Register:
    return arith.divui(self._int(a), self._int(b))

  def minimum(self, a: Register, b: Register) -> Register:
    return arith.minui(self._int(a), self._int(b))

  def both(self, a: Register, b: Register) -> Register:
    return arith.andi(self._int(a), self._int(b))

  def either(self, a: Register, b: Register) -> Register:
    return arith.ori(self._int(a), self._int(b))

  def left(self, a: Register, bits: int) -> Register:
    return arith.shli(self._int(a), self._int(bits))

  def right(self, a: Register, bits: int) -> Register:
    return arith.shrui(self._int(a), self._int(bits))

  def less(self, a: Register, b: Register) -> Register:
    """1 or 0."""
    found = arith.cmpi(
        arith.CmpIPredicate.ult, self._int(a), self._int(b))
    return arith.extui(self._i32, found)

  def same(self, a: Register, b: Register) -> Register:
    """1 or 0."""
    found = arith.cmpi(arith.CmpIPredicate.eq, self._int(a), self._int(b))
    return arith.extui(self._i32, found)

  def permute(self, a: Register, b: Register, selector: Register) -> Register:
    """Byte `n` is byte `selector >> 4 n & 7` of `b:a` (`a` the lower)."""
    return self._asm(
        [self._i32], [self._int(x) for x in (a, b, selector)],
        "prmt.b32 $0, $1, $2, $3;")[0]

  # float32.

  def float(self, bits: Register) -> Register:
    if isinstance(bits, float):
      return arith.constant(self._f32, bits)
    return arith.bitcast(self._f32, self._int(bits))

  def bits(self, x: Register) -> Register:
    return arith.bitcast(self._i32, self.float(x) if isinstance(
        x, float) else x)

  def sum(self, a: Register, b: Register) -> Register:
    return self._asm([self._f32], [a, b], "add.rn.f32 $0, $1, $2;")[0]

  def product(self, a: Register, b: Register) -> Register:
    return self._asm([self._f32], [a, b], "mul.rn.f32 $0, $1, $2;")[0]

  def fma(self, a: Register, b: Register, c: Register) -> Register:
    return self._asm([self._f32], [a, b, c], "fma.rn.f32 $0, $1, $2, $3;")[0]

  def mma(self, a: Sequence[Register], b: Sequence[Register],
          c: Sequence[Register], kind: str) -> list[Register]:
    """`c + a b` by the warp, `mma.m16n8k16` of the PTX manual.

    Args:
      a: 4 registers of two 16-bit floats.
      b: 2 such registers.
      c: 4 float32.
      kind: `"bf16"` or `"f16"`.
    """
    return self._asm(
        [self._f32] * 4, [*map(self._int, a), *map(self._int, b), *c],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        together=True)

  # Memory.

  def advance(self, name: str, index: Register, stride: int) -> None:
    """Moves the start of an array by `index * stride` bytes, in 64 bits."""
    wide = arith.extui(self._i64, self._int(index))
    step = arith.muli(wide, arith.constant(self._i64, stride))
    self._at[name] = arith.addi(self._at[name], step)

  def _where(self, name: str, offset: Register) -> ir.Value:
    return arith.addi(
        self._at[name], arith.extui(self._i64, self._int(offset)))

  def load(self, name: str, offset: Register, words: int, *,
           where: Register = 1, once: bool = False) -> list[Register]:
    """1, 2 or 4 aligned words that nobody writes; anything unless `where`.

    `once`: nobody reads them again, so that the near cache need not hold them.
    """
    hints = ".L1::no_allocate.L2::128B" if once else ""
    vector = f".v{words}" if words > 1 else ""
    outs = ", ".join(f"${n}" for n in range(words))
    outs = f"{{{outs}}}" if words > 1 else outs
    load = f"ld.global{hints}{vector}.b32 {outs}, [${words}];"
    at = self._where(name, offset)
    if isinstance(where, int):
      return self._asm([self._i32] * words, [at], load, effects=once)
    return self._asm(
        [self._i32] * words, [at, where],
        f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; @p {load} }}",
        effects=once)

  def store(self, name: str, offset: Register, value: Register, kind: str, *,
            where: Register) -> None:
    """A float32, rounded to `kind` (`"f32"`, `"bf16"`, `"f16"`), if `where`."""
    convert, source = "", "$1"
    if kind != "f32":
      convert = f".reg .b16 h; cvt.rn.{kind}.f32 h, $1; "
      source = "h"
    size = 32 if kind == "f32" else 16
    self._asm(
        [], [self._where(name, offset), value, self._int(where)],
        f"{{ .reg .pred p; {convert}setp.ne.b32 p, $2, 0; "
        f"@p st.global.b{size} [$0], {source}; }}", effects=True)

  def shared_at(self, name: str, offset: Register) -> Register:
    """Where in all shared memory that is."""
    return self.add(self._shared[name], offset)

  def shared_load(self, at: Register, words: int, *,
                  constant: bool = False) -> list[Register]:
    """1, 2 or 4 aligned words at `shared_at`'s place; `constant` if no more is
    written to them."""
    vector = f".v{words}" if words > 1 else ""
    outs = ", ".join(f"${n}" for n in range(words))
    outs = f"{{{outs}}}" if words > 1 else outs
    return self._asm(
        [self._i32] * words, [at],
        f"ld.shared{vector}.b32 {outs}, [${words}];", effects=not constant)

  def shared_store(self, at: Register, values: Sequence[Register]) -> None:
    """1, 2 or 4 aligned words at `shared_at`'s place."""
    words = len(values)
    vector = f".v{words}" if words > 1 else ""
    outs = ", ".join(f"${n + 1}" for n in range(words))
    outs = f"{{{outs}}}" if words > 1 else outs
    self._asm(
        [], [at, *map(self._int, values)],
        f"st.shared{vector}.b32 [$0], {outs};", effects=True)

  def peer_load(
      self, at: Register, rank: int, *, where: Register
  ) -> Register:
    """A word of the shared memory of block `rank` of the cluster; anything
    unless `where`."""
    return self._asm(
        [self._i32], [at, self._int(rank), self._int(where)],
        "{ .reg .pred p; .reg .b32 a; setp.ne.b32 p, $3, 0; "
        "mapa.shared::cluster.u32 a, $1, $2; "
        "@p ld.shared::cluster.b32 $0, [a]; }", effects=True)[0]

  # Control.

  def order(self) -> None:
    """Loads before this are on their way before what follows begins; loads
    through the read-only path (`ld.global.nc`) would not heed it."""
    self._asm([], [], "bar.warp.sync 0xffffffff;", effects=True,
              together=True)

  def loop(
      self, start: Register, stop: Register, step: int,
      carry: Sequence[Register],
      body: Callable[[Register, list[Register]], list[Register]],
  ) -> list[Register]:
    """`carry = body(n, carry)` for `n` from `start`, the same in a warp."""
    loop = scf.ForOp(*map(self._int, (start, stop, step)), [*carry])
    with ir.InsertionPoint(loop.body):
      scf.YieldOp(body(loop.induction_variable, [*loop.inner_iter_args]))
    return [*loop.results]

  def wait(self, who: str) -> None:
    """All threads of the block, or of the cluster's blocks, get here first."""
    self._asm([], [], {
        BLOCK: "bar.sync 0;",
        CLUSTER: "barrier.cluster.arrive.aligned; "
                 "barrier.cluster.wait.aligned;"}[who],
              effects=True, together=True)
    # A load of a constant is no side effect to LLVM: that it comes after the
    # wait, it must learn from the address.
    self._shared = {
        name: self._asm([self._i32], [at], "mov.b32 $0, $1;", effects=True)[0]
        for name, at in self._shared.items()}
