"""A run's folder on disk: one reader and one writer for each kind of file.

config.json   all arguments, versions, device, and the layout of the population
log.jsonl     one line per block, with every agent's metrics for each of its updates; it survives a kill
metrics.npz   every metric `[H, S, U]`, and `num_updates [H]`
summary.json  final evaluations with their statistics
curves.png    learning curves
heatmap.png   final returns of a sweep over two fields
search.png    final returns of a search against each of its fields, which of them matter, and the best settings
parallel.png  the settings of a search as lines over its fields
lineage.png   the hyperparameters of population-based training over time, and who copied whom
best.json     the arguments that repeat the training of the best setting on fresh seeds
winner/       the folder of that training
checkpoints/  states from which the run can be resumed
wandb/        files of Weights & Biases
.last-words   how to go on with a run of several processes, one of which has died

Of `run`, it imports only `console` and `sweep`. Change it to store a run in another form.
"""
