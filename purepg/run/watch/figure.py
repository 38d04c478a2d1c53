"""A matplotlib figure that notebooks display, although no pyplot made it."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
