"""What of the GPU benchmarks a CPU can check: the float64 memory they check against, how they count, and what they print."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_compile, gpu, gpu_compile
from train.plan import hlo


def test_float64_agrees_with_the_memory_in_outputs_and_along_a_random_direction():
    """29 tokens: three whole blocks and part of one. bfloat16 inputs are the same numbers on both sides."""
    out, slope = gpu.errors("xla", heads=2, width=16, tokens=29, block=8, window=4, seed=0)
    assert out < 8e-3 and slope < 2e-2  # the read and the gradients are rounded to bfloat16, 4e-3, on the way


def test_a_wrong_window_is_seen():
    right = gpu.exact_memory(gpu.made_inputs(1, 29, 2, 16, 0), 4, 8)
    wrong = gpu.exact_memory(gpu.made_inputs(1, 29, 2, 16, 0), 5, 8)
    assert (right[:8] == wrong[:8]).all() and abs(right - wrong).max() > 1e-2


def test_ratios_of_what_was_measured():
    took = {"GDN xla": 2e-3, "HOLA xla W=64": 3e-3, "GDN pallas": 1e-3, "GDN fla (Triton)": 2e-3}
    lines = gpu.ratios(took, 16 * 2048 * 4)
    assert "GDN pallas / fla = 0.50 (target: at most 0.67)" in lines
    assert "HOLA W=64 / GDN, xla = 1.50 (target: at most 1.6)" in lines
    assert not [line for line in lines if "W=256" in line]  # was not measured
    floor = 16 * 2048 * 4 * gpu.FLOOR_FLOPS / gpu.REACHED
    assert f"GDN pallas / floor at 790 TFLOP/s = {1e-3 / floor:.1f} (target: at most 3)" in lines


def test_a_decoded_tokens_bytes_are_the_states_both_ways_and_the_rows_it_may_read():
    rows = 64 + sum(range(gpu.LOOP)) / gpu.LOOP
    assert gpu.step_bytes(3, 4, 256) == 3 * 4 * (2 * 4 * 256 * 256 + rows * 2 * (256 + 256))


def test_the_decoding_loop_is_token_after_token():
    """From a state behind 2048 tokens: a block begins there, and the loop ends inside it."""
    token = [np.asarray(x, "bfloat16" if i < 3 else "float32") for i, x in enumerate(gpu.made_inputs(2, 1, 1, 16, 0))]
    state = gpu.memory_state(2, 1, 16, gpu.NEAR)
    total, after = jax.jit(gpu.decode_memory("xla"))(state, *token)
    assert (after.position == gpu.NEAR + gpu.LOOP).all() and gpu.NEAR % gpu.BLOCK == gpu.FAR % gpu.BLOCK == 0
    assert (after.block_values[:, 0, : gpu.LOOP] == token[2][:, 0, 0][:, None]).all()
    assert not after.block_values[:, 0, gpu.LOOP :].any() and jnp.isfinite(total).all() and total.any()


@pytest.mark.slow
def test_decoding_is_measured_beside_what_cannot_run(capsys):
    sizes = ["--width=16", "--heads=1", "--decode-batches=1", "--copy-bytes=65536"]
    gpu.main(["--parts=decoding", "--models=none", *sizes])
    printed = capsys.readouterr().out
    assert "memory, xla    B=1 " in printed and "of the copy (target: at least 60%)" in printed
    assert "memory, pallas B=1    not here: NotImplementedError" in printed


@pytest.mark.slow
def test_what_cannot_run_is_named_and_the_rest_is_measured(capsys):
    gpu.main(["--parts=memory", "--width=16", "--heads=1", "--shapes=1x64"])
    printed = capsys.readouterr().out
    assert "GDN fla (Triton)             not here: ModuleNotFoundError" in printed
    assert "HOLA W=64 / GDN, xla = " in printed
    assert "HOLA pallas W=64             not here: NotImplementedError" in printed


@pytest.mark.parametrize(("read", "text"), [(gpu.shapes, "16"), (gpu.shapes, "0x4"), (gpu.chosen_parts, "memry")])
def test_options_that_are_wrong_say_what_is_right(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"write BATCHxTOKENS|the parts are exact"):
        read(text)


LINE = (
    "  %m = (bf16[8,64]{1,0}, f32[8]{0}) custom-call(%a, %b), "
    'custom_call_target="mosaic_gpu_v2", operand_layout_constraints={bf16[8,64]{1,0}, s32[4]{0}}, '
    'api_version=API_VERSION_TYPED_FFI, metadata={op_name="jit(f)/jvp()/my_kernel/mpmd_map" scheduling_name="m"}'
)


def test_bytes_of_a_kernel_are_those_of_its_operands_and_results():
    assert gpu_compile.moved_by_kernel(f"{LINE}\n  %x = f32[2]{{0}} add(%y, %z)") == {
        "my_kernel": 8 * 64 * 2 + 8 * 4 + 8 * 64 * 2 + 4 * 4
    }


def test_registers_spills_and_shared_memory_are_read_from_what_is_left(tmp_path):
    """A warpgroup that multiplies asks for more registers than the kernel starts with."""
    (tmp_path / "my_kernel_0.resources.txt").write_text("Resources(smem_scratch_bytes=1234, tmem_scratch_cols=0)")
    (tmp_path / "my_kernel_0.ptx").write_text(
        "setmaxnreg.dec.sync.aligned.u32 40;\nsetmaxnreg.inc.sync.aligned.u32 232;"
    )
    ptxas = tmp_path / "ptxas"
    told = (
        "ptxas info : Compiling",
        "0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads",
        "ptxas info : Used 168 registers, used 16 barriers",
    )
    ptxas.write_text("#!/bin/sh\n" + "".join(f"echo '{line}' >&2\n" for line in told))
    ptxas.chmod(0o755)
    assert gpu_compile.assembled(tmp_path, "my_kernel", str(ptxas)) == gpu_compile.Assembled(232, 12, 1234)
    assert gpu_compile.assembled(tmp_path, "my_kernel", None) == gpu_compile.Assembled(None, None, 1234)


def test_the_read_computes_at_least_what_the_floor_does():
    for width, window in ((256, 64), (64, 256)):
        for work in gpu_compile.cache_read(width, window).work.values():
            assert work.floor_flops < work.flops < 3 * work.floor_flops


def test_a_step_moves_little_more_than_its_floor():
    """What parts of the read hand on is the most of it, a fiftieth; with a part that is not full, a tenth."""
    work = gpu_compile.decoding_step(256, 64).work["hola_step_token"]
    assert work.floor_bytes < work.moved < 1.05 * work.floor_bytes
    call = gpu_compile.kernel.Call(1, 4, 2, 256, 64, 128, 64, 1.0, 1.0, jnp.bfloat16, None)
    seen = [gpu_compile.kernel.bytes_moved(call, filled) for filled in (0, 1, 32, 33)]
    assert seen[1] - seen[0] == 32 * 2 * (2 * 128 + 4 * 64) + 4 * 4 * (64 + 2)  # shared keys are read once
    assert seen[1] == seen[2] < seen[3]


DECODED = """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %step = f32[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(token)/hola_step_token/call"}
  %other = f32[8]{0} custom-call(%step), custom_call_target="else", metadata={op_name="jit(token)/else"}
  ROOT %end = f32[8]{0} conditional(%other, %a), branch_computations={%x, %y}
}
"""


def test_what_a_decoded_token_moves_leaves_our_kernels_to_be_counted_by_hand():
    """The root stays, whatever it is: a program needs one."""
    program = hlo.parse(DECODED)
    assert [decode_compile.ours(each) for each in program.entry.instructions.values()] == [False, True, False, False]
    rest = decode_compile.without(program, lambda each: decode_compile.ours(each) or each.opcode == "conditional")
    assert list(rest.entry.instructions) == ["a", "other", "end"]
    assert decode_compile.floor_bytes(1) == 4 * (8 * 256 * 256 + 4 * 256 * 320)
    for implementation in ("pallas_tpu", "pallas_gpu"):
        assert 1 < decode_compile.kernel_bytes(implementation, 16) / decode_compile.floor_bytes(16) < 1.05
    assert decode_compile.kernel_bytes("xla", 16) == 0
