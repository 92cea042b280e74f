"""The PTX machine: instructions against the ISA's definitions, and faults that it has to find in code without them."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ptx_machine import MachineError, Program

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from automix_kernels import mix_attention, reference  # noqa: E402
from launches import Recorder, compile_launch, launched_with  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 32
{
"""


def computed(lines: str, count: int = 1) -> list[int]:
    """What the lines leave in %r1, %r2, ... of each thread: [threads] a register. %r0 is the thread's number."""
    store = "ld.param.b64 %rd0, [kernel_param_0];\nmul.wide.u32 %rd1, %r0, 4;\nadd.s64 %rd2, %rd0, %rd1;\n"
    for i in range(1, count + 1):
        store += f"st.global.b32 [ %rd2 + {128 * (i - 1)} ], {{ %r{i} }};\n"
    output = torch.zeros(count, 32, dtype=torch.int32)
    Program(f"{HEAD}mov.u32 %r0, %tid.x;\n{lines}\n{store}ret;\n}}\n").run((1,), [output], 64)
    return output.numpy().view(np.uint32)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mov.b32 %r2, 0x11223344;\nmov.b32 %r3, 0x55667788;\nprmt.b32 %r1, %r2, %r3, 0x5140U;", 0x77338844),
        ("mov.b32 %r2, 0x00008000;\nprmt.b32 %r1, %r2, 0, 0x9990U;", 0xFFFFFF00),
        ("mov.b32 %r2, 0x000000F0;\nbfe.u32 %r1, %r2, 4, 4;", 0xF),
        ("mov.b32 %r2, 0x000000F0;\nbfe.s32 %r1, %r2, 4, 4;", 0xFFFFFFFF),
        ("mov.b32 %r2, 0xFF;\nmov.b32 %r3, 0;\nbfi.b32 %r1, %r2, %r3, 8, 4;", 0xF00),
        ("mov.b32 %r2, 0x80000000;\nshr.s32 %r1, %r2, 40;", 0xFFFFFFFF),
        ("mov.b32 %r2, 0x80000000;\nshr.u32 %r1, %r2, 40;", 0),
        ("mov.b32 %r2, 0x0001FFFF;\nmov.b32 %r3, 0x00010002;\nadd.s16x2 %r1, %r2, %r3;", 0x00020001),
        ("mov.b16 %rs1, 1;\nadd.s16 %rs2, %rs1, 1;\nmov.b32 %r1, {%rs2, %rs1};", 0x00010002),
        ("mov.b32 %r2, -7;\nmul.hi.s32 %r1, %r2, 0x40000000;", 0xFFFFFFFE),
        ("mov.b32 %r2, 0f3F808000;\ncvt.rn.bf16x2.f32 %r1, %r2, %r2;", 0x3F803F80),  # a tie goes to the even one
        ("mov.b32 %r2, 0f3F818000;\ncvt.rn.bf16x2.f32 %r1, %r2, %r2;", 0x3F823F82),
        ("mov.b32 %r2, 0f3F801000;\ncvt.rna.tf32.f32 %r1, %r2;", 0x3F802000),  # this one away from zero
        ("mov.b32 %r2, 0f7FC00000;\nmov.b32 %r3, 0f3F800000;\nmax.f32 %r1, %r2, %r3;", 0x3F800000),
        ("mov.b32 %r2, 0f7FC00000;\nsetp.neu.f32 %p1, %r2, %r2;\nselp.b32 %r1, 1, 2, %p1;", 1),
        ("mov.b32 %r2, 0f7FC00000;\nsetp.ne.f32 %p1, %r2, %r2;\nselp.b32 %r1, 1, 2, %p1;", 2),
        # 1 + 2^-12 squared, less 1: the product is not rounded before the addition
        ("mov.b32 %r2, 0f3F800800;\nmov.b32 %r3, 0fBF800000;\nfma.rn.f32 %r1, %r2, %r2, %r3;", 0x3A000400),
    ],
)
def test_instructions(line, expected):
    assert (computed(line) == expected).all()


def test_threads_that_part_meet_again():
    """A loop of as many rounds as the thread's number, and a choice within it."""
    numbers = computed(
        """mov.b32 %r1, 0;
mov.b32 %r2, 0;
$again:
setp.ge.u32 %p1, %r2, %r0;
@%p1 bra $done;
and.b32 %r3, %r2, 1;
setp.eq.b32 %p2, %r3, 0;
@%p2 bra $even;
add.s32 %r1, %r1, 100;
bra.uni $next;
$even:
add.s32 %r1, %r1, 1;
$next:
add.s32 %r2, %r2, 1;
bra.uni $again;
$done:
shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;""",
        2,
    )
    expected = [(n + 1) // 2 + n // 2 * 100 for n in range(32)]
    assert numbers[0].tolist() == expected
    assert numbers[1].tolist() == [expected[n ^ 1] for n in range(32)]


def test_instructions_it_does_not_know_are_named():
    with pytest.raises(MachineError, match="unknown instruction: frob"):
        computed("frob.b32 %r1, %r2;")


def test_finds_lanes_that_store_other_bits_to_one_place():
    """As the lanes of a butterfly do where a product is fused into its first addition (kernels/rounding.py)."""
    assert (computed("mov.b32 %r1, 7;\nmov.b32 %r2, 0;\nst.shared.b32 [%r2], %r1;") == 7).all()
    with pytest.raises(MachineError, match="write different bits to one place of the shared memory"):
        computed("mov.b32 %r1, 7;\nmov.b32 %r2, 0;\nst.shared.b32 [%r2], %r0;")


@pytest.fixture
def attention(monkeypatch):
    """The attention's forward pass at 40 positions, for one architecture: run(change) runs the changed code.

    With 192 channels copies run ahead of the products; with 64 the operands are stored by the threads themselves.
    """

    def prepare(target, channels=192):
        launches, generator = [], torch.Generator().manual_seed(0)
        monkeypatch.setattr(mix_attention, "_architecture", lambda device: target)
        monkeypatch.setattr(mix_attention, "_forward_kernel", Recorder(mix_attention._forward_kernel, launches))
        projection = torch.randn(2, 40, channels, generator=generator).bfloat16()
        value, partner = torch.randn(2, 40, generator=generator).bfloat16(), torch.tensor([1, 0])
        lam = torch.full((2,), 0.5)  # enters nothing without the parameters
        outputs = mix_attention.launch_forward(projection, value, partner, lam, None, None, None, None)
        ((kernel, arguments),) = launches
        compiled = compile_launch(kernel, dict(arguments), target)
        exact = reference.mix_attention(projection.double(), value.double(), partner, lam.double())

        def run(change=lambda code: code, grid=(1, 2), shared=compiled.metadata.shared, **changed):
            code = change(compiled.asm["ptx"])
            Program(code).run(grid, launched_with(kernel, arguments | changed), shared)
            return (outputs[0] - exact).abs().max().item()

        return SimpleNamespace(run=run, code=compiled.asm["ptx"], projection=projection)

    return prepare


def without(instruction: str):
    return lambda code: re.sub(rf"^\s*{re.escape(instruction)}.*;$", "", code, flags=re.MULTILINE)


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_finds_nothing_in_good_code(attention, target):
    assert attention(target).run() < 1e-5


@pytest.mark.parametrize("target", ["sm80", "sm90"])
@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("bar.sync", "without a barrier"),
        ("cp.async.wait_group", "has not been waited for"),
    ],
)
def test_finds_what_is_missing(attention, target, instruction, told):
    with pytest.raises(MachineError, match=told):
        attention(target).run(without(instruction))


def test_finds_products_that_are_not_fenced_or_not_waited_for(attention):
    kernel = attention("sm90", 64)
    with pytest.raises(MachineError, match="without a proxy fence"):
        kernel.run(without("fence.proxy.async"))
    assert not kernel.run(without("wgmma.wait_group.sync.aligned")) < 0.1


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_finds_accesses_outside_of_the_tensors(attention, target):
    kernel = attention(target)
    with pytest.raises(MachineError, match="tensor"):
        kernel.run(projection_ptr=kernel.projection[:1].clone())
    with pytest.raises(MachineError, match="shared memory has 1024 bytes"):
        kernel.run(shared=1024)
    with pytest.raises(MachineError, match="no multiple of"):
        kernel.run(lambda code: re.sub(r"(cp\.async\.cg\.shared\.global \[ %r\d+) \+ 0", r"\1 + 8", code))


@triton.jit
def _every_block_writes(output_ptr, input_ptr):
    tl.store(output_ptr + tl.arange(0, 32), tl.load(input_ptr + tl.arange(0, 32)))


def test_finds_blocks_in_each_others_way():
    output, source = torch.zeros(32), torch.ones(32)
    arguments = {"output_ptr": output, "input_ptr": source, "num_warps": 1, "enable_fp_fusion": True}
    compiled = compile_launch(_every_block_writes, dict(arguments), "sm80")
    program = Program(compiled.asm["ptx"])
    program.run((1,), [output, source], 0)
    assert torch.equal(output, source)
    with pytest.raises(MachineError, match="a block writes what another one has read or written"):
        program.run((2,), [output, source], 0)
    with pytest.raises(MachineError, match="a block reads what another one has written"):
        program.run((2,), [output, output], 0)
