"""Blocks and bytes by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import packing


def test_spans_cover_the_rows_once():
  assert packing.spans(576, 128) == [(0, 0, 4, 128), (4, 512, 1, 64)]
  assert packing.spans(128, 64) == [(0, 0, 2, 64)]
  assert packing.spans(48, 64) == [(0, 0, 1, 48)]


def test_pack_by_hand():
  codes = jnp.asarray([[1, 2], [3, 4], [5, 6], [15, 0]], jnp.uint8)[None]
  packed = packing.pack(codes)
  # Row 0 is low and row 2 high in byte row 0; rows 1 and 3 in byte row 1.
  np.testing.assert_array_equal(packed, [[0x51, 0x62], [0xF3, 0x04]])
  np.testing.assert_array_equal(packing.unpack(packed, 4), codes)
