"""Clusters of a weight's outputs, as AdaMSS draws them in PEFT.

PEFT's files do not say which output is in which cluster: it is found anew, by
a randomised SVD with a seed (`torch.svd_lowrank`; Halko et al. 2009,
0909.4061, algorithms 4.4 and 5.1) and then by Lloyd's algorithm (scikit-learn's
`KMeans(init="random", n_init=1)`, also with a seed). Both are done here in
float64 from the same random numbers. An output that lies between two clusters
to within float32's rounding may fall to either, in PEFT as well.
"""

from __future__ import annotations

import numpy as np

from lora_jax.adapters import torch_random

# What PEFT has, and does not let anyone choose.
SEED, STEPS, TOLERANCE = 123456789, 10, 1e-4


def svd_lowrank(
    a: np.ndarray, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """(U `[m, rank]`, V' `[rank, n]`) of a `[m, n]`, float64, as
  `torch.svd_lowrank(a, rank, niter=2)` after `torch.manual_seed(seed)`."""
  m, n = a.shape
  tall = np.asarray(a.T if m < n else a, np.float64)
  start = torch_random.Generator(seed).normal((tall.shape[1], rank))
  q = np.linalg.qr(tall @ start)[0]
  for _ in range(2):
    q = np.linalg.qr(tall.T @ q)[0]
    q = np.linalg.qr(tall @ q)[0]
  u, _, vt = np.linalg.svd(q.T @ tall, full_matrices=False)
  u = q @ u
  return (vt.T, u.T) if m < n else (u, vt)


def kmeans(x: np.ndarray, count: int) -> np.ndarray:
  """Which of `count` clusters each row of `x [n, d]` is in, `[n]` int32."""
  x = np.asarray(x, np.float64)
  x = x - x.mean(0)
  n = len(x)
  even = np.ones(n, np.float32)
  centres = x[np.random.RandomState(SEED).choice(
      n, size=count, replace=False, p=even / even.sum())]
  before = np.full(n, -1)
  for _ in range(STEPS):
    labels = _nearest(x, centres)
    moved = _centres(x, labels, centres)
    shift = ((moved - centres)**2).sum()
    centres = moved
    if np.array_equal(labels, before):
      break
    before = labels
    if shift <= TOLERANCE * x.var(0).mean():
      break
  return _nearest(x, centres).astype(np.int32)


def _nearest(x, centres):
  return ((centres**2).sum(1) - 2 * x @ centres.T).argmin(1)


def _centres(x, labels, before):
  """Means of the clusters. One that is empty gets the row that is farthest
  from its own centre."""
  counts = np.bincount(labels, minlength=len(before))
  sums = np.zeros_like(before)
  np.add.at(sums, labels, x)
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    far = ((x - before[labels])**2).sum(1)
    for new, row in zip(empty, np.argsort(-far, kind="stable"), strict=False):
      sums[labels[row]] -= x[row]
      counts[labels[row]] -= 1
      sums[new], counts[new] = x[row], 1
  return sums / np.maximum(counts, 1)[:, None]
