"""Where A and B start, and what that leaves of the base.

*Drawn* starts look at shapes alone and have A B = 0:

  default         A ~ U(+-1/sqrt(i)), B = 0                      2106.09685
  gaussian        A ~ N(0, 1/r^2), B = 0
  orthogonal      A and B both random, their rows orthogonal: A B = 0

*Decomposed* ones take A and B out of the weight W `[i, o]` itself, and what
they leave replaces it in the base, quantised as the base is (q, with Q = q(...)
dequantised):

  pissa           s A B = SVD_r(W),     base q(W - s A B)        2404.02948
  pissa_niter_<n> the same by a randomised SVD with n power iterations
                  (Halko et al. 2011, 0909.4061, algorithm 4.4), much faster
  loftq           Q_t = q(W - s A_{t-1} B_{t-1}),
                  s A_t B_t = SVD_r(W - Q_t), A_0 B_0 = 0        2310.08659
  olora           W' = Q R, A = R[:r]', B = Q[:, :r]',
                  base q(W - s A B)                              2406.01775

*Informed* ones look at training rows as well (`train.statistics` gathers what
they need; see `informed`):

  eva             A = what the inputs vary along, B = 0; ranks
                  go where that explains most of them            2410.07170
  corda           SVD of C W, C the inputs' covariance;
                  base q(W - s A B)                              2406.05223
  lora_ga         A and B out of the SVD of the gradient of W;
                  base q(W - s A B)                              2407.05000

SVD_r = U S V' gives A = U sqrt(S/s), B = sqrt(S/s) V'. The scale s is divided
out, as Hugging Face PEFT does for PiSSA; for LoftQ it does not, which is right
for s = 1 only. On an unquantised base PiSSA changes no output; on a quantised
one, pissa (QPiSSA) and loftq quantise less of W than q(W) does.

Embeddings are looked up, not multiplied: theirs is always the drawn start.
"""

from lora_jax.adapters.starts.drawn import embedding
from lora_jax.adapters.starts.drawn import gaussian
from lora_jax.adapters.starts.drawn import kaiming
from lora_jax.adapters.starts.drawn import orthogonal
from lora_jax.adapters.starts.informed import components
from lora_jax.adapters.starts.informed import redistributed
from lora_jax.adapters.starts.replacing import attached
from lora_jax.adapters.starts.replacing import digest
from lora_jax.adapters.starts.replacing import original
from lora_jax.adapters.starts.replacing import Originals
from lora_jax.adapters.starts.replacing import replace
from lora_jax.adapters.starts.replacing import taken
from lora_jax.adapters.starts.table import choose
from lora_jax.adapters.starts.table import derived
from lora_jax.adapters.starts.table import replaces
from lora_jax.adapters.starts.table import Start

__all__ = [
    "Originals", "Start", "attached", "choose", "components", "derived",
    "digest", "embedding", "gaussian", "kaiming", "original", "orthogonal",
    "redistributed", "replace", "replaces", "taken",
]
