"""A run's folder on disk: one reader and one writer for each kind of file.

config.json   all arguments, versions, device, and the layout of the population
log.jsonl     a line per block with every agent's metrics for each of its updates; it survives a kill
metrics.npz   every metric `[H, S, U]`, and `num_updates [H]`
summary.json  final evaluations with their statistics
curves.png    learning curves
heatmap.png   the final returns of a sweep over two fields
checkpoints/  states from which the run can be resumed
wandb/        the files of Weights & Biases

Imports nothing of `run` but `console` and `sweep`. Change it to keep a run in another form.
"""
