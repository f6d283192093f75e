"""Machine code read back: small listings whose passes are counted by hand."""

import pytest

from gq_triton.kernels.machine_code import AMD, NVIDIA, PTX, Instruction, main_pass

LOOP = """
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R1, 0x10 ;
.L_x_1:
        /*0020*/               @P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FMUL R4, R4, R1 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   FADD R4, R4, R4 ;
.L_x_2:
        /*0070*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*0080*/                   IADD3.X R3, R3, RZ, RZ, P1, !PT ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"""


def nvidia_pass(text):
    return main_pass(NVIDIA.parse(text), NVIDIA)


def test_a_pass_is_the_longest_path_through_the_loop():
    done = nvidia_pass(LOOP)
    expected = ["LDG.E.128", "FMUL", "BRA", "MUFU.EX2", "FADD", "STG.E.128", "IADD3.X", "BRA"]
    assert (done.opcodes, done.outside, done.loop) == (expected, 3, True)  # outside: S2R, MOV, EXIT


def test_without_a_loop_the_kernel_is_the_pass():
    done = nvidia_pass(LOOP.replace("@P2 BRA `(.L_x_1)", "NOP"))
    assert (len(done.opcodes), done.outside, done.loop) == (11, 0, False)
    assert done.opcodes[-1] == "EXIT"  # what follows is never reached


def test_of_two_branches_the_longer_one_counts_and_dead_code_does_not():
    branches = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
        /*0010*/                   FADD R0, R0, R0 ;
        /*0020*/                   BRA `(.L_x_2) ;
        /*0030*/                   FMUL R9, R9, R9 ;
.L_x_1:
        /*0040*/                   FFMA R0, R0, R0, R0 ;
        /*0050*/                   FFMA R0, R0, R0, R0 ;
        /*0060*/                   FFMA R0, R0, R0, R0 ;
.L_x_2:
        /*0070*/                   EXIT ;
"""
    assert nvidia_pass(branches).opcodes == ["BRA", "FFMA", "FFMA", "FFMA", "EXIT"]


NESTED = """
.outer:
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
.inner:
        /*0010*/                   {inner} ;
        /*0020*/               @P0 BRA `(.inner) ;
        /*0030*/                   STG.E desc[UR4][R2.64], R0 ;
        /*0040*/               @P1 BRA `(.outer) ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize("inner", ["FADD", "LDG.E.128"])  # look-ups may move more than the data
@pytest.mark.parametrize("trips", [1, 3])
def test_a_loop_within_counts_as_often_as_it_is_taken(inner, trips):
    done = main_pass(NVIDIA.parse(NESTED.format(inner=f"{inner} R4, R4")), NVIDIA, trips)
    assert done.opcodes == ["LDG.E", *[inner, "BRA"] * trips, "STG.E", "BRA"]
    assert done.outside == 1


def test_the_main_loop_is_the_innermost_that_stores():
    assert nvidia_pass(NESTED.format(inner="STG.E.128 desc[UR4][R2.64], R4")).opcodes == ["STG.E.128", "BRA"]


def test_where_no_loop_stores_the_main_loop_is_the_innermost_that_loads():
    text = NESTED.format(inner="LDG.E.128 R4, R4").replace("STG.E", "FADD")
    assert nvidia_pass(text).opcodes == ["LDG.E.128", "BRA"]


def test_a_called_function_counts_where_it_is_called():
    call = """
        /*0000*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0010*/               @P0 CALL.REL.NOINC `(.L_x_0) ;
        /*0020*/                   FADD R0, R0, R0 ;
.L_x_0:
        /*0030*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_s64:
        /*0040*/                   IMAD.WIDE.U32 R0, R0, R0, RZ ;
        /*0050*/                   RET.REL.NODEC R12 `(kernel) ;
"""
    assert nvidia_pass(call).opcodes == [
        "CALL.REL.NOINC",
        "IMAD.WIDE.U32",
        "RET.REL.NODEC",
        "CALL.REL.NOINC",  # to a label of its own: a branch
        "FADD",
        "EXIT",
    ]


def test_a_slow_path_of_diverged_warps_is_left_out():
    slow = """
        /*0000*/                   BRA.DIV UR4, `(.L_x_0) ;
        /*0010*/                   EXIT ;
.L_x_0:
        /*0020*/                   SHFL.IDX PT, R0, R0, RZ, 0x1f ;
        /*0030*/                   SHFL.IDX PT, R0, R0, RZ, 0x1f ;
        /*0040*/                   EXIT ;
"""
    assert nvidia_pass(slow).opcodes == ["BRA.DIV", "EXIT"]


GCN = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\tv_mov_b32_e32 v0, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[4:7], v[2:3], off
\ts_and_saveexec_b64 s[2:3], vcc
\ts_cbranch_execz .LBB0_3
\tv_exp_f32_e32 v4, v4
.LBB0_3:
\tv_mul_lo_u32 v5, v5, v6
\tglobal_store_dwordx4 v[2:3], v[4:7], off
\ts_cbranch_vccnz .LBB0_1
\ts_endpgm
\t.section\t.rodata
\t.amdhsa_kernel kernel
\ts_looks_like_code but, is not
"""


def test_amd_code():
    done = main_pass(AMD.parse(GCN), AMD)
    classes = [AMD.classify(opcode) for opcode in done.opcodes]
    assert classes == ["load 128", "scalar", "scalar", "special exp", "", "store 128", "scalar"]
    assert (done.outside, done.loop) == (3, True)


def test_ptx():
    text = """
$L__BB0_1:
	@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	st.global.v2.b16 [ %rd3 + 0 ], { %rs1, %rs2 };
	st.shared.b32 [ %r7 + 0 ], %r8;
	{.reg .b64 a; mad.wide.u32 a, %r1, 4, %rd4; ld.global.nc.b32 %r9, [a];}
	@%p2 bra 	$L__BB0_1;
	ld.global.b64 %rd4, [ %rd5 + 0 ];
	ret;
"""
    done = main_pass(PTX.parse(text), PTX)
    assert [PTX.moved(opcode) for opcode in done.opcodes] == [16, 16, 4, 0, 0, 4, 0]


@pytest.mark.parametrize(
    "opcode, name, work",
    [
        ("MUFU.LG2", "special lg2", {"issue": 1, "special": 1}),
        ("LDG.E.U8.CONSTANT", "load 8", {"issue": 1, "memory": 1}),
        ("LDG.E.64", "load 64", {"issue": 1, "memory": 2}),
        ("LDGSTS.E.BYPASS.128", "load 128", {"issue": 1, "memory": 4}),
        ("LDS.128", "shared load 128", {"issue": 1, "memory": 4}),
        ("STL", "local store 32", {"issue": 1, "memory": 1}),
        ("HMMA.16816.F32.BF16", "tensor mma", {"issue": 1}),
        ("HGMMA.64x256x16.F32.BF16", "tensor wgmma", {"issue": 1}),
        ("UTCQMMA", "tensor tcgen05", {"issue": 1}),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier", {"issue": 1}),
        ("IMAD.WIDE", "int64", {"issue": 1, "multiply": 1}),
        ("ISETP.GE.AND.EX", "int64", {"issue": 1, "integer": 1}),
        ("LDC.64", "", {"issue": 1}),
        ("DFMA", "fp64", {"issue": 1}),
        ("F2F.F64.F32", "fp64", {"issue": 1, "special": 1}),
        ("FSETP.GEU.AND", "", {"issue": 1, "integer": 1}),
        ("HFMA2.BF16_V2", "", {"issue": 1, "multiply": 1}),
        ("ULDC.64", "", {"issue": 1}),
    ],
)
def test_nvidia_instructions(opcode, name, work):
    assert NVIDIA.classify(opcode) == name
    assert NVIDIA.work(opcode) == work


@pytest.mark.parametrize(
    "opcode, name, work",
    [
        ("v_log_f32_e32", "special log", {"issue": 4}),
        ("v_fma_f32", "", {"issue": 1}),
        ("v_mad_u64_u32", "int64", {"issue": 4}),
        ("v_add_f64", "fp64", {"issue": 1}),
        ("v_mfma_f32_16x16x16_bf16", "tensor mfma", {}),
        ("s_barrier", "barrier", {}),
        ("buffer_load_ushort", "load 16", {"memory": 1}),
        ("ds_read_b128", "shared load 128", {"shared": 4}),
        ("ds_bpermute_b32", "shuffle", {"shared": 1}),
        ("scratch_store_dword", "local store 32", {"memory": 1}),
        ("v_add_f32_dpp", "shuffle", {"issue": 1}),
    ],
)
def test_amd_instructions(opcode, name, work):
    assert AMD.classify(opcode) == name
    assert AMD.work(opcode) == work


def test_a_chain_longer_than_the_recursion_limit():
    code = [Instruction("FADD", successors=(i + 1,)) for i in range(5000)] + [Instruction("EXIT")]
    assert len(main_pass(code, NVIDIA).opcodes) == 5001
