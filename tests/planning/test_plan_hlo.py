import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cascade.planning.hlo import Memory, memory, traffic


def module(entry: str, *others: str) -> str:
    """An HLO module of instructions; the last one of each computation is its root."""

    def computation(header: str, body: str) -> str:
        lines = [line.strip() for line in body.strip().splitlines()]
        lines[-1] = "ROOT " + lines[-1]
        return header + " {\n" + "\n".join("  " + line for line in lines) + "\n}\n"

    parts = [
        computation(f"%{o.split()[0]} (p: f32[]) -> f32[]", o.split(None, 1)[1]) for o in others
    ]
    return (
        "HloModule m\n\n" + "".join(parts) + computation("ENTRY %main (p: f32[]) -> f32[]", entry)
    )


def test_an_instruction_reads_its_operands_and_writes_its_result_once():
    got = traffic(
        module(
            """
            %a = f32[4,8]{1,0} parameter(0)
            %b = bf16[8]{0} parameter(1)
            %t = (f32[4,8]{1,0}, bf16[8]{0}) tuple(%a, %b)
            %c = f32[4,8]{1,0} get-tuple-element(%t), index=0
            %d = f32[32]{0} bitcast(%c)
            %e = f32[] custom-call(%d, %b), custom_call_target="f"
            """
        )
    )
    assert got.hbm_bytes == 4 * 32 + 2 * 8 + 4


def test_fast_memory_is_not_hbm_and_tiles_pad_what_is():
    got = traffic(
        module(
            """
            %a = f32[3,100]{1,0:T(8,128)} parameter(0)
            %b = bf16[2,3,100]{1,2,0:T(8,128)(2,1)} parameter(1)
            %c = f32[3,100]{1,0:T(8,128)S(1)} negate(%a)
            %d = f32[3,100]{1,0:T(8,128)} custom-call(%c, %b), custom_call_target="f"
            """
        )
    )
    # a is read, b (whose innermost dimension is that of 3) too, d is written.
    assert got.hbm_bytes == 2 * 4 * 8 * 128 + 2 * (2 * 104 * 128)


def test_a_copy_into_fast_memory_is_read_once():
    shape, fast = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
    got = traffic(
        module(
            f"""
            %a = {shape} parameter(0)
            %s = ({fast}, {shape}, u32[]{{:S(2)}}) copy-start(%a)
            %d = {fast} copy-done(%s)
            """
        )
    )
    assert got.hbm_bytes == 4 * 8 * 128


SLICED = """
    fused
    %x = f32[6,100]{1,0} parameter(0)
    %i = s32[] parameter(1)
    %y = f32[6,100]{1,0} parameter(2)
    %z = s32[] constant(0)
    %s = f32[1,100]{1,0} dynamic-slice(%x, %i, %z), dynamic_slice_sizes={1,100}
    %n = f32[1,100]{1,0} negate(%s)
    %u = f32[6,100]{1,0} dynamic-update-slice(%y, %n, %i, %z)
    """


def test_a_fusion_touches_only_the_slices_that_it_reads_and_updates():
    got = traffic(
        module(
            """
            %x = f32[6,100]{1,0} parameter(0)
            %y = f32[6,100]{1,0} parameter(1)
            %i = s32[] parameter(2)
            %f = f32[6,100]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%fused
            """,
            SLICED,
        )
    )
    assert got.hbm_bytes == 400 + 4 + 400


LOOP = (
    """
    %x = f32[100]{0} parameter(0)
    %z = s32[] constant(2)
    %n = s32[] constant(9)
    %m = s32[] copy(%n)
    %t = (s32[], f32[100]{0}, s32[]) tuple(%z, %x, %m)
    %w = (s32[], f32[100]{0}, s32[]) while(%t), condition=%cond, body=%body
    """,
    """
    cond
    %p = (s32[], f32[100]{0}, s32[]) parameter(0)
    %i = s32[] get-tuple-element(%p), index=0
    %n = s32[] get-tuple-element(%p), index=2
    %c = pred[] compare(%i, %n), direction=LT
    """,
    """
    body
    %p = (s32[], f32[100]{0}, s32[]) parameter(0)
    %i = s32[] get-tuple-element(%p), index=0
    %one = s32[] constant(STEP)
    %j = s32[] add(%i, %one)
    %x = f32[100]{0} get-tuple-element(%p), index=1
    %y = f32[100]{0} negate(%x)
    %n = s32[] get-tuple-element(%p), index=2
    %t = (s32[], f32[100]{0}, s32[]) tuple(%j, %y, %n)
    """,
)


@pytest.mark.parametrize("step,trips", [(1, 7), (2, 4)])
def test_a_loop_counts_as_often_as_its_counter_and_limit_tell(step, trips):
    entry, condition, body = (part.replace("STEP", str(step)) for part in LOOP)
    # A trip negates 100 numbers and adds to a scalar, from another one.
    assert traffic(module(entry, condition, body)).hbm_bytes == 8 + trips * (800 + 12)


def test_a_limit_handed_down_through_an_outer_loop_is_found():
    outer = """
        around
        %p = (s32[], f32[100]{0}, s32[]) parameter(0)
        %k = s32[] get-tuple-element(%p), index=0
        %x = f32[100]{0} get-tuple-element(%p), index=1
        %n = s32[] get-tuple-element(%p), index=2
        %z = s32[] constant(0)
        %t = (s32[], f32[100]{0}, s32[]) tuple(%z, %x, %n)
        %w = (s32[], f32[100]{0}, s32[]) while(%t), condition=%cond, body=%body
        %y = f32[100]{0} get-tuple-element(%w), index=1
        %one = s32[] constant(1)
        %j = s32[] add(%k, %one)
        %l = (s32[], f32[100]{0}, s32[]) tuple(%j, %y, %n)
        """
    entry, condition, body = (part.replace("STEP", "1") for part in LOOP)
    entry = entry.replace("body=%body", "body=%around")
    got = traffic(module(entry, condition, body, outer))
    assert got.hbm_bytes == 8 + 7 * (12 + 9 * 812)


def test_a_noted_trip_count_is_taken_and_an_unknown_one_refused():
    entry, condition, body = (part.replace("STEP", "1") for part in LOOP)
    noted = entry.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert traffic(module(noted, condition, body)).hbm_bytes == 8 + 5 * 812
    with pytest.raises(ValueError, match="how often the loop w runs"):
        traffic(module(entry.replace("constant(9)", "parameter(1)"), condition, body))


def test_a_conditional_counts_as_its_larger_branch():
    small = "small\n%p = f32[10]{0} parameter(0)\n%n = f32[10]{0} negate(%p)"
    large = small.replace("small", "large").replace("[10]", "[20]")
    entry = """
        %i = s32[] parameter(0)
        %x = f32[10]{0} parameter(1)
        %y = f32[20]{0} parameter(2)
        %c = f32[10]{0} conditional(%i, %x, %y), branch_computations={%small, %large}
        """
    assert traffic(module(entry, small, large)).hbm_bytes == 160


@pytest.mark.parametrize(
    "groups,n",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,4]T(1,0)) {'c'}", 4),
        ("mesh['a'=1,'b'=2,'c'=4] {'b','c':(2)2}", 4),
    ],
)
def test_collectives_count_what_a_ring_sends(groups, n):
    lines = [
        f"%{i} = f32[100]{{0}} {kind}(%x), channel_id={i}, replica_groups={groups}"
        for i, kind in enumerate(
            ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]
        )
    ]
    got = traffic(module("%x = f32[100]{0} parameter(0)\n" + "\n".join(lines)))
    assert got.sent_bytes == {
        "all-gather": 400 * (n - 1),
        "all-reduce": 400 * 2 * (n - 1) / n,
        "reduce-scatter": 400 * (n - 1) / n,
        "all-to-all": 400 * (n - 1) / n,
        "collective-permute": 400,
    }
    assert set(got.counts.values()) == {1}


def test_a_tpus_collectives_in_fusions_are_found_and_counted_once():
    """One all-gather in three fusions that hide it, and a reduce-scatter made of two parts."""
    part = """
        NAME
        %p = f32[100]{0} parameter(0)
        %g = f32[400]{0} all-gather(%p), channel_id=8, replica_groups=[1,4]<=[4]
        """
    scatter = """
        all-reduce-scatter.1
        %p = f32[400]{0} parameter(0)
        %r = f32[400]{0} all-reduce(%p), channel_id=9, replica_groups=[1,4]<=[4]
        %z = s32[] constant(0)
        %s = f32[100]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={100}
        """
    names = ["start", "middle", "done"]
    entry = "%x = f32[100]{0} parameter(0)\n" + "\n".join(
        f"%{n} = f32[400]{{0}} fusion(%x), kind=kCustom, calls=%{n}" for n in names
    )
    entry += "\n%s = f32[100]{0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1"
    got = traffic(module(entry, *(part.replace("NAME", n) for n in names), scatter))
    assert got.counts == {"all-gather": 1, "reduce-scatter": 1}
    assert got.sent_bytes == {"all-gather": 1200, "reduce-scatter": 1200}


def test_a_compiled_program_of_this_machine_moves_at_least_what_it_must():
    """XLA's own text: a scan over weights that are gathered, their gradients scattered."""
    mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def loss(ws, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    shapes = (
        jax.ShapeDtypeStruct((6, 64, 64), jnp.float32),
        jax.ShapeDtypeStruct((256, 64), jnp.float32),
    )
    step = jax.jit(jax.grad(loss), in_shardings=(split, rows), out_shardings=split)
    hlo = step.lower(*shapes).compile().as_text()
    assert len(re.findall(r" while\(", hlo)) == 2
    got, layer = traffic(hlo), 64 * 64 * 4
    # Each of 6 layers is gathered forward and, unless it was kept, backward.
    gathered = got.sent_bytes["all-gather"] / (layer * 3 / 4)
    assert gathered in (6, 12)
    reduced = got.sent_bytes["all-reduce"] + 2 * got.sent_bytes["reduce-scatter"]
    assert reduced >= 6 * 2 * layer * 3 / 4
    assert got.hbm_bytes > 6 * 3 * layer


def test_memory_is_of_what_lies_in_hbm_and_counts_a_result_in_an_arguments_place_once():
    got = memory(
        """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=4096,offset=0): f32[1024]{0}
allocation 1: size 100, parameter 1, shape |f32[25]| at ShapeIndex {}:
allocation 2: size 32, maybe-live-out:
allocation 3: size 512, thread-local:
allocation 4: size 7, constant:
allocation 5: size 16, output shape is |(f32[4])|, maybe-live-out:
allocation 6: size 9999, color 1, preallocated-temp:
allocation 7: size 2048, preallocated-temp:
 value: <2 q @0> (size=2048,offset=0): f32[512]{0}
"""
    )
    assert got == Memory(4096 + 100, 2048, 4096 + 100 + 32 + 7 + 16 + 2048)
    with pytest.raises(ValueError, match="not the text"):
        memory("HloModule m")


def test_memory_is_what_the_compiled_program_says(tmp_path):
    step = jax.jit(lambda x, y: (x @ y, jnp.sin(x @ x).sum()), donate_argnums=0)
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    options = {"xla_dump_to": str(tmp_path)}
    said = step.lower(shape, shape).compile(compiler_options=options).memory_analysis()
    (file,) = tmp_path.glob("*after_optimizations-buffer-assignment.txt")
    got, temporary = memory(file.read_text()), said.temp_size_in_bytes
    assert got.argument_bytes == said.argument_size_in_bytes == 2 * 4 * 64 * 64
    assert got.temporary_bytes == temporary > 0
    held = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    assert got.peak_bytes == pytest.approx(held + temporary, abs=100)
