"""Environments: one thin adapter per suite into `purepg.types.Env`, and our own, whose solutions are known.

Imports only `types`. To add an environment, return an `Env` from a function and name it in `make`.
"""

from purepg.envs.finite_mdp import mdp_env
from purepg.envs.gymnax import gymnax_env
from purepg.envs.lqr import lqr_env
from purepg.envs.registry import make
from purepg.envs.tasks import token_env
