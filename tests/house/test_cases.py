"""A case is a promise too: what benches have measured, and every bound was set with, are its sizes,
its way of calling and its draws."""

from pathlib import Path

import pytest
import torch

import fusedmlp
from fusedmlp import reference
from fusedmlp.testing import CASES, hyper, moe

PROMISED = Path(__file__).with_name("cases.txt")
SIZED = {
    case.name: case
    for cases in (hyper.sized(), *(moe.sized(*s).values() for s in ((5, 1, False), (4, 2, True))))
    for case in cases
}
SIZE = 6, 140, 136
NONE = fusedmlp.Lora()


def arguments(case, drawn):
    """name, shape and what is known of its numbers."""
    for name, t in drawn.items():
        assert t.device.type == "cpu"
        known = [str(t.dtype).removeprefix("torch.")] if name in case.draws else []
        known += [f"times {case.scales[name]}"] if name in case.scales else []
        known += ["straight through"] if name in case.straight_through else []
        yield " ".join([name, "x".join(map(str, t.shape)), *known])


def called(case, drawn):
    """What the op and its reference are called with beside them."""
    shared = {k: v for k, v in case.options.items() if k in case.reference_options}
    made, _ = (case.adapt(dict(drawn), functions) for functions in (fusedmlp, reference))
    lora = (made.get("lora") or NONE)._asdict()
    adapters = {p: (*a.a.shape, a.scale) for p, a in lora.items() if a is not None}
    for what, given in ("options", dict(case.options)), ("shared", shared), ("lora", adapters):
        if given:
            yield f"{what} {given}"
    for name, t in made.items():
        if name == "position":
            yield f"position {t.tolist()}"
        elif name != "lora" and not isinstance(t, torch.Tensor):
            yield f"{name} {t if isinstance(t, int) else type(t).__name__}"
    kinds = ("gated", "forward_only", "fits_cuda")
    yield ", ".join(kind for kind in kinds if getattr(case, kind))


def row(case):
    """On a CPU, whatever the default device is."""
    with torch.device("meta"):
        drawn = case.inputs(*SIZE, torch.float32, "cpu")
        found = [*arguments(case, drawn), *called(case, drawn)]
    out = case.fake_output(*SIZE)
    assert out.is_meta and case.fn is getattr(fusedmlp, case.op)
    assert case.reference is getattr(reference, case.op)
    moved = f"{case.elements(*SIZE)} moved, {case.elements(1, 1, 1)} of 1 x 1 x 1"
    return f"{case.name}: {'; '.join((*found, 'x'.join(map(str, out.shape)), moved))}"


def test_cases_are_those_that_were_promised():
    rows = [row(case) for case in (*CASES.values(), *SIZED.values())]
    promised = PROMISED.read_text().splitlines()
    differences = "\n".join(sorted(set(rows) ^ set(promised)))
    assert rows == promised, f"tests/house/cases.txt must hold the cases, differs:\n{differences}"


def test_experts_are_spread_as_they_say():
    """Tokens of each of five experts; and the gaps between a token's three."""
    generator, E = torch.Generator().manual_seed(0), 5
    parts = {
        name: (spread(E)((4000,), generator).bincount(minlength=E) / 4000).tolist()
        for name, spread in moe.SPREADS.items()
    }
    third = pytest.approx(1 / 3, abs=0.05)
    assert parts["uniform"] == [pytest.approx(1 / E, abs=0.05)] * E
    assert parts["skewed"] == [pytest.approx(0.1, abs=0.03)] * 4 + [pytest.approx(0.6, abs=0.05)]
    assert parts["sparse"] == [third, 0, third, 0, third]
    case = moe.experts_case("", E, "uniform", 3)
    first, second, last = case.inputs(4000, 2, 2, torch.float32)["expert"].T
    assert ((second - first) % E).unique().tolist() == [1, 2, 3]
    assert ((last - second) % E).unique().tolist() == [1]


def test_numbers_of_one_bit_weights_and_masks():
    """Words of any sign, scales as of weights of variance 1 / columns, no bit in the last octet."""
    drawn = CASES["binary_linear"].inputs(4, 384, 4000, torch.float32)
    words, scales = drawn["q_weight"], drawn["s_weight"].double() * 384**0.5
    assert words.min() < -(2**30) and words.max() > 2**30
    assert 0.499 < scales.min() < 0.51 and 1.49 < scales.max() < 1.501
    planes = CASES["masked_gated_linear-4-bits"].inputs(4, 60, 200, torch.float32)["masks"]
    assert planes[:, -1].max() == 0 and planes[:, :-1].amin((0, 2)).max() == 0
    assert planes[:, :-1].amax((0, 2)).min() == 255


@pytest.mark.parametrize("activation, reach", ((None, 1), ("softcap_swiglu", 25)))
def test_numbers_are_uniform_and_reach_where_a_gate_bends(activation, reach):
    """They have variance 1, weights are divided by the root of their columns."""
    for name, case in CASES.items():
        drawn = case.inputs(64, 96, 128, torch.float64, activation=activation)
        for argument in drawn.keys() - case.draws.keys():
            if (t := drawn[argument]).numel() < 500:
                continue
            size = reach if argument in ("x", "g", "u", "b", "b_gate", "b_up", "b_in") else 1
            if argument.startswith("w"):
                size = t.shape[-1] ** -0.5
            assert 0.9 * 3**0.5 < t.abs().max() / size <= 3**0.5, (name, argument)
            assert 0.8 < t.std() / size < 1.2, (name, argument)


KINKED = [
    name
    for name, case in CASES.items()
    if case.op in ("gated_linear", "gated_mlp", "linear_act", "mlp") or case.straight_through
]


@pytest.mark.parametrize("D, step", ((4, 1 / 2), (40, 1 / 8), (67, 1 / 8), (256, 1 / 16)))
@pytest.mark.parametrize("name", KINKED)
def test_no_rounding_carries_a_pre_activation_across_a_kink(name, D, step):
    """Each is an odd number of steps, whatever is added to the product."""
    case = CASES[name]
    with torch.device("meta"):  # the default, which is not asked
        drawn = case.inputs(32, D, 24, torch.float64, "cpu", activation="relu")
    x = drawn["x"]
    for projection in ("gate", "up", "in", ""):
        w, b = (drawn.get(f"{n}_{projection}" if projection else n) for n in "wb")
        if w is None:
            continue
        masks = drawn.get("masks", torch.ones(1, 1, 1)) > 0
        products = x @ (w * masks).mT
        down = "up" if projection == "in" else projection
        if (a := drawn.get(f"w_{down}_a")) is not None and not case.options.get("packed"):
            scale = case.adapt(dict(drawn), fusedmlp)["lora"]._asdict()[down].scale
            added = scale * (x @ a.T) @ drawn[f"w_{down}_b"].T
            assert 0 < added.abs().max() <= 16, projection
        else:
            added = torch.zeros(1)
        assert 0.8 < products.square().mean() ** 0.5 < 3, projection
        for g in (products + added, products + added + (0 if b is None else b)):
            steps = g / step
            assert steps.frac().abs().max() == 0 and (steps % 2).min() == 1, projection
        assert b is None or b.any()


def test_arguments_of_a_gate_lie_off_its_kink():
    drawn = CASES["gated_act"].inputs(64, 8, 64, torch.float64, activation="relu")
    for t in drawn.values():
        assert 0.05 < t.abs().min() < 0.06 and 0.95 < t.std() < 1.15
    drawn = CASES["binary_linear"].inputs(8, 40, 8, torch.float32, activation="relu")
    assert (drawn["s_weight"] == 1 / 8).all() and drawn["q_weight"].unique().numel() > 16
    drawn = CASES["moe_mlp"].inputs(8, 64, 16, torch.float32, activation="relu")
    for name, step in (("w_gate", 1 / 8), ("w_up", 1 / 8), ("w_down", 1 / 4)):
        assert drawn[name].abs().unique().tolist() == [step, 3 * step]
