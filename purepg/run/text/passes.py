"""pass@k, the probability that at least one of k responses to a prompt passes."""

from math import comb

import numpy as np

PASSES = 0.5  # a response passes if its first reward is above this


def pass_at(k: int, n: int, correct: np.ndarray) -> np.ndarray:
    """The unbiased estimate from n responses, of which `correct` pass (Chen et al. 2021, eq. 1):

    pass@k = 1 - C(n - c, k) / C(n, k)
    """
    missed = np.array([comb(n - c, k) / comb(n, k) for c in range(n + 1)])
    return 1 - missed[correct]


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [2**i for i in range(n.bit_length())]


def passed(sampled: np.ndarray, greedy: np.ndarray) -> list[np.ndarray]:
    """pass@k for each power of two, and the share of greedy responses that pass, as means over the prompts.

    Args:
      sampled: first rewards `[..., prompts, n]`. greedy: `[..., prompts]`.
    """
    n, correct = sampled.shape[-1], (sampled > PASSES).sum(-1)
    of_k = [pass_at(k, n, correct).mean(-1) for k in powers_of_two(n)]
    return [x.astype(np.float32) for x in (*of_k, (greedy > PASSES).mean(-1))]
