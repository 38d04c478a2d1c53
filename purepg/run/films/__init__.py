"""Films of trained agents: whole episodes, played on the device and written as a GIF. Nothing here needs a display.

It imports `load` and `evaluation` to choose an agent, and `watch` to log the film; nothing else in `run` imports this
room. To draw another environment, write a function from its state to a `Scene` and name it in `film.drawing_of`.
"""
