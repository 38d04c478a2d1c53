"""A policy over a large vocabulary, whose logits are computed for a few tokens at a time and never kept.

The logits of 32 rows of 48 tokens over 49,152 words take 300 MB, several times over in a gradient; the hidden states
that they follow from take 1/85 of that in a model 576 wide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.equations.distributions import Categorical, jointly
from purepg.language.transformer import logits_of
from purepg.loops import in_chunks
from purepg.types import Action, Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenCategorical:
    """`Categorical(logits_of(hidden, head) / temperature)`, computed for `at_once` batch elements at a time.

    Attributes:
      hidden: `[..., hidden_size]`.
      head: as in `logits_of`; converted to the dtype of `hidden` in every chunk, so that its gradient is summed over
        chunks in its own.
      temperature: divides the logits.
      spread: as of `loops.in_chunks`.
    """

    hidden: Array
    head: Array
    temperature: Array | float
    tied: bool = field(metadata={"static": True})
    at_once: int | None = field(metadata={"static": True})
    spread: bool = field(default=True, metadata={"static": True})

    def whole(self) -> Categorical:
        """The same policy with all of its logits."""
        head = self.head.astype(self.hidden.dtype)
        return Categorical(logits_of(self.hidden, head, self.tied) / self.temperature)

    def log_prob(self, action: Action) -> Array:
        return jointly(Categorical.log_prob, (self,), action)

    def entropy(self) -> Array:
        return jointly(Categorical.entropy, (self,))

    def kl(self, other: "HiddenCategorical") -> Array:
        return jointly(Categorical.kl, (self, other))

    def mode(self) -> Action:
        return jointly(Categorical.mode, (self,))

    def jointly(self, f: Callable[..., Any], policies: Sequence["HiddenCategorical"], *arrays: Any) -> Any:
        """See `distributions.jointly`."""
        axes = self.hidden.shape[:-1]
        num = int(np.prod(axes))
        flat = jax.tree.map(lambda x: x.reshape(num, *x.shape[len(axes) :]), arrays)
        hidden = [policy.hidden.reshape(num, -1) for policy in policies]

        def of_chunk(hidden, arrays):
            categorical = (
                HiddenCategorical(x, policy.head, policy.temperature, policy.tied, None).whole()
                for x, policy in zip(hidden, policies, strict=True)
            )
            return f(*categorical, *arrays)

        found = in_chunks(of_chunk, self.at_once, hidden, flat, spread=self.spread)
        return jax.tree.map(lambda x: jnp.reshape(x, (*axes, *x.shape[1:])), found)
