"""What the program for a GPU launches and moves, by a program whose kernels are known, and by PPO's and SAC's own; and
the model of several GPUs."""

import importlib.util

import gpu_cost
import pytest
from parts.compiled_cost import Device, Exchange, cost_of
from scaling_model import NVLINK, Link, Work, exchange_seconds, pays_from, speedup

DEVICE = Device(bytes_per_second=1e9, launch_seconds=1e-6)
# A loop of 5 trips with a product and the write of a row; a branch of one kernel or of two; views and constants.
PROGRAM = """HloModule jit_f

%fused_row (param_0.1: f32[100,8], param_1.2: f32[8], param_2.3: s32[]) -> f32[100,8] {
  %param_0.1 = f32[100,8]{1,0} parameter(0)
  %param_1.2 = f32[8]{0} parameter(1)
  %bitcast.1 = f32[1,8]{1,0} bitcast(%param_1.2)
  %param_2.3 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %write = f32[100,8]{1,0} dynamic-update-slice(%param_0.1, %bitcast.1, %param_2.3, %zero.1)
}

%fused_read (param_0.4: f32[100,8]) -> f32[8] {
  %param_0.4 = f32[100,8]{1,0} parameter(0)
  %slice.1 = f32[1,8]{1,0} slice(%param_0.4), slice={[3:4], [0:8]}
  ROOT %bitcast.2 = f32[8]{0} bitcast(%slice.1)
}

%body (arg: (s32[], f32[100,8], f32[8])) -> (s32[], f32[100,8], f32[8]) {
  %arg = (s32[], f32[100,8]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %rows = f32[100,8]{1,0} get-tuple-element(%arg), index=1
  %x = f32[8]{0} get-tuple-element(%arg), index=2
  %twice = f32[8]{0} multiply(%x, %x), metadata={op_name="jit(f)/mul"}
  %written = f32[100,8]{1,0} fusion(%rows, %twice, %i), kind=kLoop, calls=%fused_row
  ROOT %tuple = (s32[], f32[100,8]{1,0}, f32[8]{0}) tuple(%i, %written, %twice)
}

%condition (arg.1: (s32[], f32[100,8], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[100,8]{1,0}, f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

%one (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %negate = f32[8]{0} negate(%a)
}

%two (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %exp = f32[8]{0} exponential(%b)
  ROOT %sum = f32[8]{0} add(%exp, %b)
}

ENTRY %main (p: f32[100,8], q: f32[8], r: pred[]) -> f32[8] {
  %p = f32[100,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %r = pred[] parameter(2)
  %start = s32[] constant(0)
  %carry = (s32[], f32[100,8]{1,0}, f32[8]{0}) tuple(%start, %p, %q)
  %loop = (s32[], f32[100,8]{1,0}, /*index=2*/f32[8]{0}) while(%carry), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %after = f32[100,8]{1,0} get-tuple-element(%loop), index=1
  %row = f32[8]{0} fusion(%after), kind=kLoop, calls=%fused_read
  ROOT %chosen = f32[8]{0} conditional(%r, %row, %row), true_computation=%one, false_computation=%two
}
"""


def test_kernels_and_bytes_of_a_program_are_those_counted_by_hand():
    cost, (loop,) = cost_of(PROGRAM, DEVICE)
    # A product moves three vectors of 32 bytes; a row's write reads it and its place, and writes it; a comparison reads
    # two integers and writes a flag.
    assert loop[:2] == (0, 5)
    assert loop.cost[:2] == (3, 96 + (32 + 4 + 32) + 9)
    assert loop.cost.seconds == pytest.approx(3e-6)
    # After the loop: the read of one row of a hundred, and the branch's dearer side, an exponential and a sum.
    assert cost.launches == 5 * 3 + 1 + 2
    assert cost.bytes_moved == 5 * loop.cost.bytes_moved + (32 + 32) + (64 + 96)


def test_a_kernel_takes_as_long_as_its_bytes_where_that_is_longer_than_a_launch():
    slow = cost_of(PROGRAM, Device(bytes_per_second=1.0, launch_seconds=1e-6))[0]
    assert slow.seconds == slow.bytes_moved


WORK = Work(launches=2e-3, of_env=1e-6)
EXCHANGED = [Exchange("all-reduce", 4_000_000, (4, 4)), Exchange("all-reduce", 8, ())]


def test_one_gpu_is_as_fast_as_itself():
    for link in Link(1.0, 1.0), Link(2e-5, NVLINK):
        assert exchange_seconds(EXCHANGED, 1, link) == 0.0
        assert speedup(WORK, EXCHANGED, 2048, 1, link) == 1.0


def test_exchanges_take_latency_and_the_time_of_a_ring():
    link = Link(latency=1e-5, bandwidth=1e9)
    by_hand = 17 * 1e-5 + 16 * (1.5 * 4_000_000 / 1e9) + 1.5 * 8 / 1e9  # a ring of four sends 3/2 of the bytes
    assert exchange_seconds(EXCHANGED, 4, link) == pytest.approx(by_hand)
    free = Link(0.0, float("inf"))
    assert speedup(WORK._replace(launches=0.0), EXCHANGED, 2048, 4, free) == pytest.approx(4)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_from_where_gpus_pay_each_is_used_by_half(gpus):
    link = Link(2e-5, NVLINK)
    num_envs = pays_from(WORK, EXCHANGED, gpus, link)
    assert speedup(WORK, EXCHANGED, num_envs, gpus, link) == pytest.approx(gpus / 2)
    assert speedup(WORK, EXCHANGED, 2 * num_envs, gpus, link) > gpus / 2


def refused(config, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_cost.main(gpu_cost.study, gpu_cost.Config(), arguments=config)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_wrong_target_is_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = refused(["--target", "h1000"], capsys)
    assert said.count("\n") == 1
    assert "target (h1000) must be h100 or a100, or a file" in said


HAS_PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")


@pytest.mark.skipif(not HAS_PLUGIN, reason="compiling for a GPU needs jax[cuda13], which is several gigabytes")
@pytest.mark.parametrize(("program", "most"), [("ppo:2048x1", 1800), ("ppo:64x16", 1700), ("sac:1x1", 4000)])
def test_an_update_launches_no_more_kernels_than_it_did(program, most):
    place, device = gpu_cost.target_of("h100")
    found = gpu_cost.compiled(program, gpu_cost.Config(), place, device)
    assert 0.5 * most < found.cost.launches <= most
