"""What shows a run: its learning curves, the heat map of a sweep, and Weights & Biases, during training.

Of `run`, it imports only `console`, `sweep`, `reliability` and `folder`; wandb and matplotlib are imported late. Change
`rows` to log other rows, `members` to name or configure W&B runs in another way, and `style` to give every figure
another look.
"""
