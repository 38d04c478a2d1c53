"""Floating-point operations that a language model's equations need, and how many a device can do.

A product of matrices `[m, k]` and `[k, n]` takes 2 m k n operations; everything else is left out, as are padding and
what a program computes again to save memory (model FLOPs: Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from purepg.language.transformer import TransformerConfig

# Dense operations a second in bfloat16, by how JAX's name of the device begins, of which the first counts; from the
# makers' data sheets.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def forward_flops(config: TransformerConfig, num_tokens: int, length: float, read: float) -> float:
    """Operations of a forward pass over a row.

    Args:
      num_tokens: the vocabulary's size, V.
      length: tokens in the row, T, each of which attends to itself and those before it.
      read: tokens of which logits are computed.
    """
    c = config
    projections = 2 * c.hidden_size * c.head_size * 2 * (c.num_heads + c.num_kv_heads)  # of q and o, k and v
    block = projections + 2 * c.hidden_size * 3 * c.mlp_size
    attention = 4 * c.num_heads * c.head_size * length * (length + 1) / 2
    return c.num_layers * (block * length + attention) + 2 * c.hidden_size * num_tokens * read


def update_flops(
    config: TransformerConfig,
    num_tokens: int,
    prompt: float,
    response: float,
    shape: tuple[int, int, int],
    adapters: bool,
    reference: bool,
) -> float:
    """Operations of an update that samples responses and learns from them.

    A gradient takes two forward passes more, or one where the model is frozen under adapters, whose own operations are
    left out.

    Args:
      prompt, response: their mean lengths in tokens.
      shape: prompts, responses to each, and passes over all of them in which gradients are taken.
      reference: a reference policy scores the responses.
    """
    num_prompts, group_size, num_epochs = shape
    rows = num_prompts * group_size
    read = forward_flops(config, num_tokens, prompt, 0)  # once for a whole group
    scored = forward_flops(config, num_tokens, prompt + response, response)
    passes = num_epochs * (2 if adapters else 3) + reference
    return num_prompts * read + rows * (scored - read) + rows * passes * scored


def peak_flops(device_kind: str) -> float | None:
    """The device's dense operations a second in bfloat16; None if they are not known here."""
    return next((peak for name, peak in PEAKS.items() if device_kind.startswith(name)), None)
