"""Runs on prompts and rewards of the user's own: files of prompts, rewards in Python, and the population between them.

Imports `language` for the tokenizer. Change it to read other files of prompts or to add a ready reward.
"""
