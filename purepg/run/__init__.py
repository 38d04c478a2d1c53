"""The host's side of an experiment: the command line, populations, files, Weights & Biases, pictures.

Imports everything else, and only experiments import it: nothing else knows of time, disk, network or a command line.
Change it to record or show a run in another way.
"""
