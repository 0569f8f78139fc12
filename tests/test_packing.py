"""Packing: words against an independent slow packer, and the tensors of the GPTQ format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.formats import compressed
from quantize.formats.gptq import convert_zeros, decode, encode
from quantize.formats.packing import pack, unpack
from quantize.methods.gptq import Solution

BITS = (2, 3, 4, 8)
CODES_PER_FILL = {2: 16, 3: 32, 4: 8, 8: 4}  # the fewest codes that fill whole words


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.sampled_from(BITS))
    rows = CODES_PER_FILL[bits] * draw(st.integers(1, 7))
    columns = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(rows, columns))
    return bits, torch.from_numpy(codes)


def slow_pack(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """Each column as one big little-endian integer, cut into unsigned 32-bit words."""
    columns = []
    for column in codes.t().tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(column))
        columns.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    return [list(row) for row in zip(*columns, strict=True)]


def unsigned(words: torch.Tensor) -> list[list[int]]:
    assert words.dtype == torch.int32
    return (words.to(torch.int64) & 0xFFFFFFFF).tolist()


def random_solution(bits: int, group_size: int = 32, inputs: int = 96, outputs: int = 64) -> Solution:
    random = torch.Generator().manual_seed(bits)
    groups = inputs // group_size
    order = torch.randperm(inputs, generator=random)
    return Solution(
        codes=torch.randint(0, 2**bits, (outputs, inputs), generator=random).to(torch.uint8),
        scales=torch.rand(groups, outputs, generator=random).half() + 0.01,
        zeros=torch.randint(1, 2**bits, (groups, outputs), generator=random).to(torch.uint8),
        g_idx=(order // group_size).int(),
        row_error=torch.zeros(outputs),
        damp_percent=0.1,
        damp_raised=False,
        dead_columns=0,
    )


def tensors_of(solution: Solution, bits: int, checkpoint_format: str = "gptq") -> dict[str, torch.Tensor]:
    return encode(
        solution.codes, solution.scales, solution.zeros, solution.g_idx, bits=bits, checkpoint_format=checkpoint_format
    )


@given(code_matrices())
@settings(max_examples=80, deadline=None)
def test_words_equal_the_slow_packers_and_unpack_to_the_codes(example: tuple[int, torch.Tensor]) -> None:
    bits, codes = example
    words = pack(codes, bits)
    assert words.shape == (codes.shape[0] * bits // 32, codes.shape[1])
    assert unsigned(words) == slow_pack(codes, bits)
    assert torch.equal(unpack(words, bits), codes.to(torch.uint8))


@given(code_matrices())
@settings(max_examples=20, deadline=None)
def test_any_words_survive_unpacking_and_packing(example: tuple[int, torch.Tensor]) -> None:
    bits, codes = example
    random = np.random.default_rng(int(codes.sum()))
    shape = (codes.shape[0] * bits // 32, codes.shape[1])
    words = torch.from_numpy(random.integers(-(2**31), 2**31, size=shape, dtype=np.int32))
    assert torch.equal(pack(unpack(words, bits), bits), words)


def test_three_bits_of_a_counted_sequence_give_the_words_worked_out_by_hand() -> None:
    # code i is octal digit i of the stream: 0o76543210 = 0xFAC688, four times over
    codes = torch.tensor([[place % 8] for place in range(32)])
    assert unsigned(pack(codes, 3)) == [[0x88FAC688], [0xC688FAC6], [0xFAC688FA]]


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        (0, 7, [0x00000007, 0, 0]),
        (9, 7, [0x38000000, 0, 0]),  # the last of ten whole codes
        (10, 0b101, [0x40000000, 0x1, 0]),  # two bits here, one bit there
        (11, 7, [0, 0x0000000E, 0]),
        (20, 7, [0, 0x70000000, 0]),
        (21, 0b011, [0, 0x80000000, 0x1]),  # one bit here, two bits there
        (22, 7, [0, 0, 0x0000001C]),
        (31, 7, [0, 0, 0xE0000000]),
    ],
)
def test_three_bits_lie_as_ten_one_ten_one_ten(place: int, code: int, words: list[int]) -> None:
    codes = torch.zeros(32, 1, dtype=torch.int64)
    codes[place] = code
    assert unsigned(pack(codes, 3)) == [[word] for word in words]


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_do_not_fill_words_are_refused(bits: int) -> None:
    for count in range(1, 65):
        codes = torch.zeros(count, 2, dtype=torch.int64)
        if count % CODES_PER_FILL[bits]:
            with pytest.raises(ValueError, match=f"{count} codes of {bits} bits do not fill"):
                pack(codes, bits)
        else:
            assert pack(codes, bits).shape == (count * bits // 32, 2)


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, [0x55555555], [0xAAAAAAAA]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777], [0x88888888]),
        (8, [0x7F7F7F7F], [0x80808080]),
    ],
)
def test_symmetric_zero_points_are_stored_minus_one_in_v1_and_as_they_are_in_v2(
    bits: int, v1: list[int], v2: list[int]
) -> None:
    solution = random_solution(bits)
    solution.zeros.fill_(2 ** (bits - 1))
    for checkpoint_format, words in (("gptq", v1), ("gptq_v2", v2)):
        stored = tensors_of(solution, bits, checkpoint_format)["qzeros"]
        assert unsigned(stored) == [words * (stored.shape[1] // len(words))] * 3


@pytest.mark.parametrize("bits", BITS)
def test_tensors_have_the_dtypes_and_shapes_of_the_format(bits: int) -> None:
    tensors = tensors_of(random_solution(bits), bits)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "qweight": (torch.int32, (96 * bits // 32, 64)),
        "qzeros": (torch.int32, (3, 64 * bits // 32)),
        "scales": (torch.float16, (3, 64)),
        "g_idx": (torch.int32, (96,)),
    }


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_decoded_is_what_the_solution_dequantizes_to(bits: int, checkpoint_format: str) -> None:
    solution = random_solution(bits)
    decoded = decode(tensors_of(solution, bits, checkpoint_format), bits, checkpoint_format)
    assert torch.equal(decoded, solution.dequantize())


def test_reading_v2_as_v1_gives_another_weight() -> None:
    solution = random_solution(4)
    assert not torch.equal(decode(tensors_of(solution, 4, "gptq_v2"), 4), solution.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_change_their_format_both_ways(bits: int) -> None:
    solution = random_solution(bits)
    v1, v2 = (tensors_of(solution, bits, name)["qzeros"] for name in ("gptq", "gptq_v2"))
    assert torch.equal(convert_zeros(v1, bits, "gptq", "gptq_v2"), v2)
    assert torch.equal(convert_zeros(v2, bits, "gptq_v2", "gptq"), v1)
    with pytest.raises(ValueError, match="neither gptq nor gptq_v2"):
        convert_zeros(v1, bits, "gptq", "marlin")


@pytest.mark.parametrize("bits", BITS)
def test_the_highest_zero_point_of_v1_is_read_as_zero(bits: int) -> None:
    """Other tools write zero point 0, which v1 stores as the highest number."""
    solution = random_solution(bits)
    solution.zeros.fill_(0)
    stored = encode(solution.codes, solution.scales, solution.zeros, solution.g_idx, bits=bits)
    assert set(stored["qzeros"].unique().tolist()) == {-1}
    assert torch.equal(decode(stored, bits), solution.dequantize())


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_decode_to_scale_times_code_minus_zero(bits: int, zero_points: bool) -> None:
    random = np.random.default_rng(bits)
    codes, zeros = (torch.from_numpy(random.integers(0, 2**bits, shape)) for shape in ((16, 64), (16, 2)))
    scales = torch.from_numpy(random.random((16, 2), np.float32)).bfloat16()
    words, of_zeros = (torch.tensor(slow_pack(part, bits)).to(torch.int32) for part in (codes.t(), zeros))
    tensors = {"weight_packed": words.t().contiguous(), "weight_scale": scales, "weight_shape": torch.tensor([16, 64])}
    if zero_points:
        tensors["weight_zero_point"] = of_zeros
    else:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    expected = scales.float().repeat_interleave(32, 1) * (codes - zeros.repeat_interleave(32, 1))
    assert torch.equal(compressed.decode(tensors, bits), expected)
    with pytest.raises(ValueError, match=r"weight_shape is \[64, 16\]"):
        compressed.decode({**tensors, "weight_shape": torch.tensor([64, 16])}, bits)
