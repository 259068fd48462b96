"""hobbit_cpp.convert: what becomes what, and the header. Pure."""

from __future__ import annotations

import io

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from gguf_files import KINDS, TYPES
from hobbit_cpp.convert import ConvertError, writer
from hobbit_cpp.convert.header import TensorInfo, pad, read_header, string_value, u32_value, write_header
from hobbit_cpp.convert.layout import make_layout
from hobbit_cpp.convert.plan import ALIGNMENT, LOW_PREFIX, MAX_NAME, Output, Plan, Tensor, is_expert, make_plan

# ---- planning: pure --------------------------------------------------------------------------------------


def experts(name: str, row: int, kind: str = "F16", n_expert: int = 4, n_rows: int = 2) -> Tensor:
    return Tensor(name, (row, n_rows, n_expert), TYPES.by_name[kind])


def up(row: int, kind: str = "F16") -> Tensor:
    return experts("blk.0.ffn_up_exps.weight", row, kind)


def types_of(plan: Plan) -> dict[str, str]:
    return {o.name: o.type.name for o in plan.outputs}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ffn_up_exps.weight", (64, 32, 8), True),
        ("blk.11.ffn_gate_up_exps.weight", (64, 32, 8), True),
        ("blk.3.ffn_down_chexps.weight", (64, 32, 8), True),
        ("blk.0.ffn_up_exps.weight", (64, 32, 1), False),  # one expert is a dense layer
        ("blk.0.ffn_up_exps.weight", (64, 32), False),
        ("blk.0.ffn_up_shexp.weight", (64, 32, 8), False),  # always used
        ("blk.0.ffn_up_exps.bias", (64, 8), False),
        ("blk.0.ffn_gate_inp.weight", (64, 8), False),
        ("hobbit.low.blk.0.ffn_up_exps.weight.x", (64, 32, 8), False),
    ],
)
def test_routed_experts_are_told_by_name_and_shape(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_expert(name, shape) is expected


@pytest.mark.parametrize(
    ("wanted", "row", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "IQ4_NL"),  # 4.5 bits both; Q4_0 as well, but that loses more
        ("Q6_K", 576, "Q5_1"),  # 6.5625 bits: 6 is nearer than 8.5
        ("Q5_K", 576, "Q5_0"),
        ("Q2_K", 576, "IQ4_NL"),  # not Q2_0, although that is nearer: it is for ternary models
        ("Q4_0", 33, "F16"),
        ("Q8_0", 100, "F16"),
        ("Q2_0", 96, "IQ4_NL"),
        ("Q2_0", 64, "Q2_0"),
        ("F32", 7, "F32"),
    ],
)
def test_a_type_that_does_not_fit_falls_back_to_the_nearest(wanted: str, row: int, expected: str) -> None:
    fitted = TYPES.fit(TYPES.by_name[wanted], row)
    assert fitted is not None and fitted.name == expected


def test_each_kind_of_fallback_is_noted_once() -> None:
    tensors = [experts(f"blk.{i}.ffn_{p}_exps.weight", 576) for i in range(3) for p in ("up", "down")]
    tensors.append(experts("blk.3.ffn_up_exps.weight", 544))
    plan = make_plan(tensors, TYPES, "Q8_0", "Q4_K")
    assert len(plan.notes) == 2
    assert "rows of 576" in plan.notes[0] and "IQ4_NL instead" in plan.notes[0]
    assert "rows of 544" in plan.notes[1]


def test_order_is_dense_then_each_layer_high_before_low() -> None:
    names = ["blk.10.ffn_down_exps.weight", "blk.2.ffn_gate_exps.weight", "blk.2.ffn_down_exps.weight"]
    names += ["blk.10.ffn_up_exps.weight", "blk.2.ffn_up_exps.weight", "blk.10.ffn_gate_exps.weight"]
    tensors = [experts(n, 32) for n in names[:3]] + [Tensor("output.weight", (32, 5), TYPES.by_name["F32"])]
    tensors += [experts(n, 32) for n in names[3:]] + [Tensor("norm.weight", (32,), TYPES.by_name["F32"])]
    plan = make_plan(tensors, TYPES, "Q8_0", "Q4_0")
    layers = [[f"blk.{i}.ffn_{p}_exps.weight" for p in ("up", "gate", "down")] for i in (2, 10)]
    expected = ["output.weight", "norm.weight"]
    for layer in layers:
        expected += layer + [LOW_PREFIX + n for n in layer]
    assert [o.name for o in plan.outputs] == expected
    assert plan.n_layers == 2 and plan.n_experts == 4


def test_keep_takes_the_source_types_and_tells_a_mixture() -> None:
    tensors = [experts("blk.0.ffn_up_exps.weight", 256, "Q4_K"), experts("blk.0.ffn_down_exps.weight", 256, "Q6_K")]
    plan = make_plan(tensors, TYPES, "keep", "Q2_K")
    assert list(types_of(plan).values()) == ["Q4_K", "Q6_K", "Q2_K", "Q2_K"]
    assert (plan.high_type, plan.low_type) == ("mixed", "Q2_K")


def test_without_low_precision_there_are_no_copies() -> None:
    for low in (None, "none", "NONE"):
        plan = make_plan([up(32)], TYPES, "q8_0", low)
        assert types_of(plan) == {"blk.0.ffn_up_exps.weight": "Q8_0"}
        assert plan.low_type == "none"


@pytest.mark.parametrize(
    ("high", "row", "low"),
    [
        ("Q8_0", 768, "IQ4_NL"),
        ("Q8_0", 96, "IQ4_NL"),
        ("F16", 768, "IQ4_NL"),
        ("Q6_K", 768, "Q3_K"),
        ("Q5_0", 768, "Q3_K"),
        ("Q5_0", 576, None),  # blocks of 256 do not divide it, and IQ4_NL is too large beside Q5_0
        ("Q4_K", 768, "Q2_K"),
        ("MXFP4", 2880, None),  # gpt-oss
        ("Q2_K", 768, None),
        ("Q8_0", 100, None),
    ],
)
def test_the_default_low_precision_follows_from_the_high_one(high: str, row: int, low: str | None) -> None:
    plan = make_plan([up(row, high)], TYPES, "keep", "auto")
    assert plan.low_type == (low or "none")
    assert bool(low) is not any("--low TYPE" in note for note in plan.notes)


def test_without_a_low_precision_for_every_tensor_there_is_none() -> None:
    tensors = [experts("blk.0.ffn_up_exps.weight", 768, "Q4_K"), experts("blk.0.ffn_down_exps.weight", 576, "Q4_0")]
    plan = make_plan(tensors, TYPES, "keep", "AUTO")
    assert plan.low_type == "none" and not any(o.role == "low" for o in plan.outputs)
    with pytest.raises(ConvertError, match=r"Q4_0 in rows of 576 .*sidecar would be empty"):
        make_plan(tensors, TYPES, "keep", "auto", sidecar=True)


def test_each_tensor_of_a_mixture_gets_its_own_default() -> None:
    tensors = [experts("blk.0.ffn_up_exps.weight", 256, "Q4_K"), experts("blk.0.ffn_down_exps.weight", 256, "Q6_K")]
    plan = make_plan(tensors, TYPES, "keep", "auto")
    assert types_of(plan)[LOW_PREFIX + "blk.0.ffn_up_exps.weight"] == "Q2_K"
    assert types_of(plan)[LOW_PREFIX + "blk.0.ffn_down_exps.weight"] == "Q3_K"


def test_types_are_found_in_any_case() -> None:
    assert make_plan([up(256)], TYPES, "q6_k", "q4_K").high_type == "Q6_K"


@pytest.mark.parametrize(
    ("high", "low", "source", "message"),
    [
        ("Q4_0", "Q4_0", "F16", "not smaller"),
        ("Q4_0", "Q8_0", "F16", "not smaller"),
        ("keep", "Q4_0", "Q4_0", "not smaller"),
        ("Q5_0", "Q9_9", "F16", "unknown type 'Q9_9': use one of"),
        ("Q8_0", "IQ2_XXS", "F16", "importance matrix"),
        ("Q8_K", "Q4_0", "F16", "cannot be stored as Q8_K"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(high: str, low: str, source: str, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        make_plan([up(256, source)], TYPES, high, low)


def test_a_fallback_can_make_low_as_large_as_high() -> None:
    with pytest.raises(ConvertError, match="not smaller"):
        make_plan([up(576)], TYPES, "Q4_0", "Q2_K")


def test_the_refusal_of_an_imatrix_type_names_types_that_do_without() -> None:
    with pytest.raises(ConvertError) as e:
        make_plan([up(256)], TYPES, "Q8_0", "IQ2_XXS")
    assert "Q2_K" in str(e.value) and "IQ2_XXS," not in str(e.value)


def test_making_a_type_larger_is_noted() -> None:
    assert "--high keep is better" in make_plan([up(64, "Q4_0")], TYPES, "Q8_0", "Q2_0").notes[0]


def test_dense_and_old_models_are_refused() -> None:
    dense = Tensor("blk.0.ffn_up.weight", (64, 64), TYPES.by_name["F16"])
    with pytest.raises(ConvertError, match="dense model"):
        make_plan([dense], TYPES, "keep", "Q4_0")
    old = Tensor("blk.0.ffn_up.3.weight", (64, 64), TYPES.by_name["F16"])
    with pytest.raises(ConvertError, match="one tensor per expert"):
        make_plan([dense, old], TYPES, "keep", "Q4_0")


def test_a_name_too_long_for_a_copy_is_refused() -> None:
    name = "x" * (MAX_NAME - len(LOW_PREFIX) - len("_exps.weight"))
    assert make_plan([experts(name + "_exps.weight", 32)], TYPES, "keep", "Q4_0").n_layers == 1
    with pytest.raises(ConvertError, match="too long"):
        make_plan([experts(name + "x_exps.weight", 32)], TYPES, "keep", "Q4_0")


def test_a_converted_file_gets_new_copies_from_its_high_precision_experts() -> None:
    tensors = [up(32, "Q8_0"), experts(LOW_PREFIX + "blk.0.ffn_up_exps.weight", 32, "Q4_0")]
    plan = make_plan(tensors, TYPES, "keep", "Q5_0")
    assert [(o.name, o.source.name, o.type.name) for o in plan.outputs] == [
        ("blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight", "Q8_0"),
        (LOW_PREFIX + "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight", "Q5_0"),
    ]
    assert "converted before" in plan.notes[0]
    with pytest.raises(ConvertError, match="--high keep"):
        make_plan(tensors, TYPES, "Q6_K", "Q4_0")


@given(
    rows=st.lists(st.sampled_from([1, 32, 48, 64, 100, 256, 576, 768]), min_size=1, max_size=6),
    high=st.sampled_from([*sorted(KINDS), "keep"]),
    low=st.sampled_from([*sorted(KINDS), "none", "auto"]),
    n_rows=st.integers(1, 50),
    part=st.integers(1, 100_000),
)
@settings(deadline=None)
def test_every_plan_is_sound_or_refused(rows: list[int], high: str, low: str, n_rows: int, part: int) -> None:
    tensors = [experts(f"blk.{i}.ffn_up_exps.weight", row, n_rows=n_rows) for i, row in enumerate(rows)]
    tensors.append(Tensor("output.weight", (32, 7), TYPES.by_name["Q8_0"]))
    try:
        plan = make_plan(tensors, TYPES, high, low)
    except ConvertError as e:
        assert "\n" not in str(e)
        return
    assert {o.source.name for o in plan.outputs} == {t.name for t in tensors}
    assert len({o.name for o in plan.outputs}) == len(plan.outputs)
    sizes: dict[tuple[str, str], int] = {}
    for o in plan.outputs:
        assert o.source.row % o.type.block == 0 and not o.type.needs_imatrix
        sizes[o.source.name, o.role] = o.n_bytes
    for max_bytes in (None, part):
        files = make_layout(plan.outputs, {"general.architecture": string_value("x")}, max_bytes)
        assert [o.name for file in files for o in file.outputs] == [o.name for o in plan.outputs]
        for number, file in enumerate(files):
            end = 0
            for o in file.outputs:
                assert o.file == number
                assert o.offset == end and o.offset % ALIGNMENT == 0
                end = o.offset + pad(o.n_bytes, ALIGNMENT)
            assert file.size == file.data_offset + end
            assert max_bytes is None or file.size <= max_bytes or len(file.outputs) == 1
            assert read_header(io.BytesIO(file.head), "x", file.size).tensors == file.tensors
    for (name, role), size in sizes.items():
        assert role != "low" or size < sizes[name, "high"]
    # every row of every source exactly once
    seen = {t.name: 0 for t in tensors}
    for (chunk,) in writer.work(plan.outputs):
        assert chunk.first_row == seen[chunk.source.name]
        seen[chunk.source.name] += chunk.n_rows
    assert seen == {t.name: t.n_rows for t in tensors}


# ---- header ----------------------------------------------------------------------------------------------


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_a_clear_error_or_a_header(
    cut: int, flip: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {"general.architecture": string_value("x"), "a": u32_value(3)}
    good = write_header(values, [TensorInfo("t.weight", (32, 2), 0, 0)])
    bad = bytearray(good)
    bad[flip % len(bad)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    for data in (bytes(bad), good[: cut % len(good)]):
        path.write_bytes(data)
        with open(path, "rb") as file:
            try:
                read_header(file, "damaged.gguf", len(data))
            except ConvertError as e:
                assert "damaged.gguf" in str(e) and "\n" not in str(e)


def test_not_smaller_is_noted() -> None:
    a = [experts("blk.0.ffn_up_exps.weight", 512, "Q4_0"), experts("blk.0.ffn_down_exps.weight", 512, "Q8_0")]
    b = [experts("blk.0.ffn_up_exps.weight", 512, "Q4_0"), experts("blk.0.ffn_down_exps.weight", 512, "Q4_0")]
    notes = make_plan(a, TYPES, "keep", None, low_from=b).notes
    assert any("is not smaller than the high one: blk.0.ffn_up" in n for n in notes)


def test_the_same_type_is_not_larger() -> None:
    assert make_plan([up(512, "Q8_0")], TYPES, "Q8_0", "Q4_0").notes == ()


def test_parts_are_no_larger_than_asked_for() -> None:
    one = TYPES.by_name["F32"]
    outputs = [
        Output(f"blk.{i}.a_name_of_some_length_that_takes_room.weight", Tensor(f"t{i}", (8,), one), one, "dense")
        for i in range(600)
    ]
    most = 64 * 4096
    files = make_layout(outputs, {}, most)
    assert len(files) > 5 and all(f.size <= most for f in files)
