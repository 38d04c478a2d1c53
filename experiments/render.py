"""Renders a trained agent in its environment: `python experiments/render.py runs/x --best` writes a GIF."""

from purepg.run.films.command import main

if __name__ == "__main__":
    main(__doc__)
