"""Tabular networks: what shares a row, what is a parameter, and the shapes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.envs.named_mdps import garnet
from purepg.networks.tabular import TabularValue, tabular_actor_critic, tabular_policy

S, A = 4, 3
MDP = garnet(num_states=S, num_actions=A)
ALIAS = np.array([1, 0, 1, 2])
ALIASED = replace(MDP, alias=ALIAS)
KEY, OBS = jax.random.key(0), jnp.arange(S)


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logits(policy: Any, table: np.ndarray, obs: Any = OBS) -> np.ndarray:
    return np.asarray(policy.apply({"params": {"logits": table}}, obs).logits)


def init(network: Any) -> Any:
    return network.init(KEY, OBS)["params"]


def test_each_state_reads_its_own_row_and_aliases_share_one():
    table = normal(0, S, A)
    np.testing.assert_array_equal(logits(tabular_policy(MDP), table), table)
    np.testing.assert_array_equal(logits(tabular_policy(ALIASED), table[:3]), table[ALIAS])


def test_there_are_as_many_rows_of_logits_as_a_policy_tells_states_apart():
    for mdp, rows in ((MDP, S), (ALIASED, 3), (replace(MDP, alias=np.zeros(S)), 1)):
        for pinned in (False, True):
            shape = (rows, A - pinned)
            assert init(tabular_policy(mdp, pinned))["logits"].shape == shape
            assert init(tabular_actor_critic(mdp, pinned))["policy"]["logits"].shape == shape


def test_a_pinned_policys_last_logit_is_zero_and_two_actions_have_a_sigmoid():
    table = normal(1, 3, A - 1)
    pinned = logits(tabular_policy(ALIASED, pinned=True), table)
    np.testing.assert_array_equal(pinned, np.append(table, np.zeros((3, 1)), axis=1)[ALIAS])
    two = garnet(num_states=S, num_actions=2)
    theta = normal(2, S, 1)
    p = jax.nn.softmax(logits(tabular_policy(two, pinned=True), theta))[:, 0]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-theta[:, 0])), rtol=1e-6)


@pytest.mark.parametrize("pinned", [False, True])
def test_the_first_policy_is_uniform_and_the_first_value_zero(pinned):
    network = tabular_actor_critic(ALIASED, pinned)
    distribution, value = network.apply(network.init(KEY, OBS), OBS)
    np.testing.assert_allclose(jax.nn.softmax(distribution.logits), np.full((S, A), 1 / A), rtol=1e-6)
    np.testing.assert_array_equal(value, np.zeros(S))


def test_values_see_the_true_state_whatever_the_policy_can_tell():
    v, q = normal(3, S), normal(4, S, A)
    np.testing.assert_array_equal(TabularValue(S).apply({"params": {"value": v}}, OBS), v)
    np.testing.assert_array_equal(TabularValue(S, A).apply({"params": {"value": q}}, OBS), q)
    assert init(TabularValue(S))["value"].shape == (S,)
    assert init(TabularValue(S, A))["value"].shape == (S, A)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_leading_batch_axes_are_kept(batch):
    obs = np.random.default_rng(5).integers(S, size=batch)
    table, v, q = normal(6, 3, A), normal(7, S), normal(8, S, A)
    network = tabular_actor_critic(ALIASED)
    distribution, value = network.apply({"params": {"policy": {"logits": table}, "value": {"value": v}}}, obs)
    np.testing.assert_array_equal(distribution.logits, table[ALIAS[obs]])
    np.testing.assert_array_equal(value, v[obs])
    np.testing.assert_array_equal(TabularValue(S, A).apply({"params": {"value": q}}, obs), q[obs])


def test_tables_are_in_the_precision_of_the_session():
    for x64, dtype in ((False, np.float32), (True, np.float64)):
        with jax.enable_x64(x64):
            assert {x.dtype for x in jax.tree.leaves(init(tabular_actor_critic(MDP)))} == {np.dtype(dtype)}
