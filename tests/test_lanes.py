"""any_lane keeps a predicate unbatched under any number of vmaps."""

import jax
import jax.numpy as jnp
import numpy as np

from purepg.lanes import any_lane

LENGTHS = jnp.array([[3, 0, 5], [1, 4, 2]])  # [H, S]


def count_to(length):
    """(the lane's own count, the loop's trips): the lane masks its own part, the loop turns for whoever needs it."""

    def body(carry):
        count, trips = carry
        return count + (count < length), trips + 1

    return jax.lax.while_loop(lambda carry: any_lane(carry[0] < length), body, (0, 0))


def test_a_loop_runs_until_the_last_lane_is_done_and_each_lane_has_its_own_result():
    count, trips = jax.jit(jax.vmap(jax.vmap(count_to)))(LENGTHS)
    np.testing.assert_array_equal(count, LENGTHS)
    # A batched predicate would stop a lane's trips at its own length.
    np.testing.assert_array_equal(trips, np.full((2, 3), 5))


def test_without_a_vmap_it_is_any():
    assert count_to(jnp.int32(4)) == (4, 4)
    assert any_lane(jnp.array([[False, True], [False, False]])).shape == ()
    assert any_lane(jnp.array([[False, True], [False, False]]))
    assert not any_lane(jnp.zeros((2, 3), bool))


def test_it_sees_over_the_lanes_of_every_vmap_and_over_the_axes_within_a_lane():
    predicate = jnp.zeros((2, 3, 4), bool)
    for where in (None, (0, 0, 0), (1, 2, 3), (1, 0, 1)):
        x = predicate if where is None else predicate.at[where].set(True)
        any_anywhere = jax.vmap(jax.vmap(any_lane))(x)
        np.testing.assert_array_equal(any_anywhere, np.full((2, 3), where is not None))


def test_a_branch_stays_a_branch_under_nested_vmaps():
    """A batched predicate would turn the cond into both branches and a select."""

    def branch(x):
        return jax.lax.cond(any_lane(x > 0), jnp.sin, jnp.cos, x)

    x = jnp.array([[-1.0, 2.0], [-3.0, -4.0]])
    nested = jax.vmap(jax.vmap(branch))
    assert "cond[" in str(jax.make_jaxpr(nested)(x))
    np.testing.assert_allclose(nested(x), np.sin(x), rtol=1e-6)
    np.testing.assert_allclose(nested(-jnp.abs(x)), np.cos(x), rtol=1e-6)


def test_lanes_that_share_one_predicate_agree_with_it():
    shared = jnp.array([False, True])
    count, trips = jax.vmap(lambda x: (x, any_lane(shared)))(jnp.arange(3))
    np.testing.assert_array_equal(count, np.arange(3))
    assert trips.all()
