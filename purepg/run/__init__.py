"""The host side of an experiment: `train_population`, the command line, files, Weights & Biases, figures and films.

It imports the rest of purepg; only experiments and `purepg/__init__.py` import it. No other part of purepg touches
the clock, the disk, the network or a command line. Change it to record or show a run differently.
"""
