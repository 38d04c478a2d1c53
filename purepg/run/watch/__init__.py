"""What shows a run: its learning curves, the heat map of a sweep, and Weights & Biases, during training.

Imports `record` and `reliability` alone, and wandb and matplotlib only where they are used. Change `rows` to log other
rows, `members` to name or configure W&B runs in another way, and `style` to give every figure another look.
"""
