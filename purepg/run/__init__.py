"""The host's side of an experiment: `train_population`, the command line, files, Weights & Biases, pictures.

Imports everything else; only experiments, and purepg's own list of names, import it. Nothing else in purepg knows of
time, disk, network or a command line. Change it to record or show a run in another way.
"""
