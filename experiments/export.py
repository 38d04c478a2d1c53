"""Writes a trained language model for other programs: `python experiments/export.py runs/x --out model`."""

from purepg.run.export import main

if __name__ == "__main__":
    main(__doc__)
