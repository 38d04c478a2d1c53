"""A state on disk and back: to the bit or not at all."""

import contextlib
import errno
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.files import RecordError, remove_folder
from purepg.types import UsageError


class Inner(NamedTuple):
    weight: Any
    nothing: Any = None


class Outer(NamedTuple):
    inner: Inner
    flags: Any
    empty: Any = ()


def make_state() -> Outer:
    """Every kind of number that a state holds, and what its bits are lost by: NaN, -0.0, subnormals."""
    weight = {
        "float32": jnp.array([[np.nan, -0.0, 1e-45], [np.inf, 0.1, -1e38]], jnp.float32),
        "bfloat16": jnp.array([0.1, -0.0, np.nan], jnp.bfloat16),
        "int32": jnp.int32(-7),
    }
    return Outer(Inner(weight), [jnp.array([True, False]), jnp.arange(250, 256, dtype=jnp.uint8)])


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state: Any) -> list[tuple[str, Any, bytes]]:
    return [
        (jax.tree_util.keystr(path), x.dtype, np.asarray(x).tobytes())
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An out folder with the states after 1, 2 and 3 updates, of which two are kept."""
    out = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(out, 0, keep=2)
    for update in 1, 2, 3:
        checkpoints.save(update, make_state(), {"seconds": update / 10})
    checkpoints.close()
    return out


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of it, to be spoiled."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_state_comes_back_bit_for_bit_and_of_the_same_types(saved):
    state = make_state()
    restored = Checkpoints(saved, 0).restore(3, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_facts_are_those_of_their_own_update(saved):
    checkpoints = Checkpoints(saved, 0)
    assert [checkpoints.facts(update)["seconds"] for update in (2, 3)] == [0.2, 0.3]


def test_a_typed_key_comes_back(tmp_path):
    key = jax.random.key(5)
    checkpoints = Checkpoints(tmp_path, 0, keep=1)
    checkpoints.save(1, {"key": key}, {})
    checkpoints.wait()
    restored = checkpoints.restore(1, jax.eval_shape(lambda: {"key": key}))["key"]
    assert jax.random.bits(restored) == jax.random.bits(key)


def test_the_latest_are_kept(saved):
    assert {path.name for path in (saved / "checkpoints" / "0").iterdir()} == {"2", "3"}
    assert Checkpoints(saved, 0).latest() == 3


def test_a_chunk_that_was_never_saved_has_no_latest_and_reading_makes_no_folder(saved):
    assert Checkpoints(saved, 1).latest() is None
    assert not (saved / "checkpoints" / "1").exists()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnames="x")
    state = jnp.arange(2_000_000.0)
    checkpoints = Checkpoints(tmp_path, 0, keep=1)
    checkpoints.save(1, {"x": state}, {})
    later = overwrite(state)
    for _ in range(10):
        later, before = overwrite(later), later
        assert before.is_deleted()  # a state is donated indeed
    checkpoints.wait()
    shape = jax.ShapeDtypeStruct((2_000_000,), jnp.float32)
    np.testing.assert_array_equal(checkpoints.restore(1, {"x": shape})["x"], np.arange(2_000_000.0))


def test_saving_the_same_update_again_changes_nothing(copied):
    checkpoints = Checkpoints(copied, 0, keep=2)
    checkpoints.save(3, jax.tree.map(jnp.zeros_like, make_state()), {"seconds": 9})
    checkpoints.close()
    again = Checkpoints(copied, 0)
    assert again.facts(3)["seconds"] == 0.3
    assert bits(again.restore(3, abstract(make_state()))) == bits(make_state())


def replaced(**weights: Any) -> Outer:
    """The state with other weights; None takes one away."""
    state = make_state()
    weight = {name: x for name, x in (state.inner.weight | weights).items() if x is not None}
    return state._replace(inner=state.inner._replace(weight=weight))


@pytest.mark.parametrize(
    "other, named",
    [
        (replaced(float32=jnp.zeros((2, 3), jnp.float16)), "inner.weight.float32"),
        (replaced(int32=jnp.uint32(0)), "inner.weight.int32"),
        (replaced(bfloat16=jnp.zeros(4, jnp.bfloat16)), "inner.weight.bfloat16"),
        (replaced(new=jnp.zeros(1)), "inner.weight.new"),
        (replaced(int32=None), "inner.weight.int32"),
        (make_state()._replace(flags=[]), "flags.0, flags.1"),
    ],
)
def test_another_dtype_shape_or_leaf_is_refused_by_its_name(saved, other, named):
    with pytest.raises(UsageError, match=rf"holds another kind of state: {named} differs$"):
        Checkpoints(saved, 0).restore(3, abstract(other))


def test_a_half_written_checkpoint_is_never_read_and_no_hindrance_to_the_next_writer(copied):
    folder = copied / "checkpoints" / "0"
    half = folder / "4.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", half)
    (half / "state" / "manifest.ocdbt").unlink()
    assert Checkpoints(copied, 0).latest() == 3
    assert half.exists()  # reading leaves things alone
    checkpoints = Checkpoints(copied, 0, keep=2)
    assert checkpoints.latest() == 3
    checkpoints.save(4, make_state(), {})
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"3", "4"}
    assert bits(Checkpoints(copied, 0).restore(4, abstract(make_state()))) == bits(make_state())


def test_a_save_that_fails_leaves_the_latest_checkpoints_and_nothing_else(copied, monkeypatch):
    """Neither half of one nor more than are to be kept, as orbax does where the disk fills while it deletes."""
    folder = copied / "checkpoints" / "0"
    checkpoints = Checkpoints(copied, 0, keep=1)

    def full(update, **_):
        shutil.copytree(folder / "3", folder / f"{update}.orbax-checkpoint-tmp")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(RecordError, match=r"cannot save a checkpoint in .*/checkpoints/0: No space left on device$"):
        checkpoints.save(4, make_state(), {})
    assert {path.name for path in folder.iterdir()} == {"3"}
    assert bits(Checkpoints(copied, 0).restore(3, abstract(make_state()))) == bits(make_state())


def spoil_data(folder):
    for path in folder.glob("state/**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1  # one bit
        path.write_bytes(data)


def spoil_metadata(folder):
    (folder / "state" / "_METADATA").write_text("{")


def spoil_manifest(folder):
    (folder / "state" / "manifest.ocdbt").write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_data, spoil_metadata, spoil_manifest])
def test_a_corrupted_checkpoint_is_refused_in_one_line(copied, spoil, capfd):
    spoil(copied / "checkpoints" / "0" / "3")
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*/checkpoints/0/3: ") as error:
        Checkpoints(copied, 0).restore(3, abstract(make_state()))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_facts_that_cannot_be_read_are_refused(copied):
    (copied / "checkpoints" / "0" / "3" / "facts" / "metadata").write_text("{")
    with pytest.raises(UsageError, match="cannot read the checkpoint"):
        Checkpoints(copied, 0).facts(3)


def test_what_cannot_be_written_is_a_record_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RecordError, match=r"cannot write .*/checkpoints/0"):
        Checkpoints(tmp_path, 0, keep=1)


def test_evaluations_come_back_and_half_of_one_does_not(copied):
    checkpoints = Checkpoints(copied, 0, keep=2)
    evaluation = {"sampled": np.array([[1.5, np.nan]], np.float32), "mode": np.array([[0.1, -0.0]], np.float32)}
    checkpoints.write_evaluation(3, evaluation)
    found = Checkpoints(copied, 0).evaluation(3)
    assert found is not None
    for name, value in evaluation.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value)
    assert Checkpoints(copied, 0).evaluation(2) is None
    (copied / "checkpoints" / "0" / "evaluation-3.json").write_text('{"sampled": [[1.5')
    assert Checkpoints(copied, 0).evaluation(3) is None


def test_of_many_differences_three_are_named(saved):
    with pytest.raises(UsageError, match=r"state: [\w.]+, [\w.]+, [\w.]+ and \d+ more differs$"):
        Checkpoints(saved, 0).restore(3, {"x": jax.ShapeDtypeStruct((), jnp.float32)})


@pytest.mark.parametrize("first", ["orbax", "tidy"])
def test_a_save_that_completes_while_it_is_removed_leaves_a_whole_checkpoint_or_none(first, tmp_path, monkeypatch):
    """orbax completes a checkpoint by giving its folder the final name."""
    checkpoints = Checkpoints(tmp_path, 0, keep=2)
    half, final = checkpoints.folder / "7.orbax-checkpoint-tmp", checkpoints.folder / "7"
    (half / "state").mkdir(parents=True)
    (half / "state" / "array").write_text("numbers")

    def complete():
        with contextlib.suppress(FileNotFoundError):
            half.rename(final)

    def remove(folder):
        (folder / "state" / "array").unlink()
        complete()
        remove_folder(folder)

    monkeypatch.setattr("purepg.run.folder.checkpoint.remove_folder", remove)
    if first == "orbax":
        complete()
    checkpoints._tidy()
    whole = [path.name for path in checkpoints.folder.rglob("*")]
    assert whole == (["7", "state", "array"] if first == "orbax" else [])
