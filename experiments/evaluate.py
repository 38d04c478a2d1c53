"""Evaluates one agent of a saved run over many whole episodes."""

from purepg.run.evaluation import main

if __name__ == "__main__":
    main(__doc__)
