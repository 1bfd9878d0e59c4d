"""Every form of PointwiseMLP's dropout_cfg, and what it says to forms that it does not take."""

import pytest
from layer_checks import draw
from torch import nn

from fusedmlp.layers import PointwiseMLP


class Interpolating:
    """An OmegaConf mapping from outside: keys and indexing, values interpolated on access."""

    def __init__(self, root, **values):
        self._root, self._values = root, values

    def keys(self):
        return self._values.keys()

    def __getitem__(self, key):
        value = self._values[key]
        return self._root[value[2:-1]] if str(value).startswith("${") else value


class Lazy:
    """What LazyConfig and LazyCall do: hold a target, make a mapping when called."""

    def __init__(self, target):
        self._target = target

    def __call__(self, **kwargs):
        return {"__target__": f"{self._target.__module__}.{self._target.__qualname__}", **kwargs}


class Holder:
    def __init__(self, target):
        self._target = target


class Nested(nn.Module):
    def __init__(self, inner, sizes=(), label=""):
        super().__init__()
        self.inner, self.sizes, self.label = inner, sizes, label

    def forward(self, x):
        return self.inner(x)


class KeysAlone:
    """No mapping: nothing is found by its keys."""

    def keys(self):
        return ["__target__"]


DROPOUT = "torch.nn.Dropout"


@pytest.mark.parametrize(
    ("config", "kind", "p"),
    [
        (None, nn.Identity, None),
        (nn.Identity, nn.Identity, None),
        (nn.Dropout, nn.Dropout, 0.5),
        (nn.Dropout(0.2), nn.Dropout, 0.2),
        ({"__target__": DROPOUT, "p": 0.3}, nn.Dropout, 0.3),
        ({"_target_": "torch.nn.modules.dropout.Dropout", "p": 0.3}, nn.Dropout, 0.3),
        ({"__target__": nn.Dropout, "p": "1 / (2 * 4)"}, nn.Dropout, 0.125),
        (Interpolating({"rate": 0.6}, __target__=DROPOUT, p="${rate}"), nn.Dropout, 0.6),
        (Lazy(nn.Dropout), nn.Dropout, 0.5),
        (Lazy(nn.Dropout)(p=0.1), nn.Dropout, 0.1),
        (lambda: nn.Dropout(0.4), nn.Dropout, 0.4),
        (Holder(nn.Identity), nn.Identity, None),
        (Holder(DROPOUT), nn.Dropout, 0.5),
    ],
)
def test_dropout_configs(config, kind, p):
    layer = PointwiseMLP(8, "gelu", config)
    assert type(layer.dropout) is kind
    if p is not None:
        assert layer.dropout.p == p
    assert layer(draw(2, 8)).shape == (2, 8)


def test_a_given_module_is_used_itself():
    dropout = nn.Dropout(0.2)
    assert PointwiseMLP(8, "gelu", dropout).dropout is dropout


def test_nested_configs_and_strings():
    here = f"{__name__}.Nested"
    layer = PointwiseMLP(
        8,
        "swiglu",
        {
            "__target__": here,
            "inner": {"__target__": DROPOUT, "p": "0.5 - 1 / 4"},
            "sizes": ["128 * 4", "-7 // 2", "7 % 4", "5", "2 ** 9", {"k": "3 + 4"}, ("1 + 1",)],
            "label": "a-b",
        },
        backend="fused",
    )
    assert layer.dropout.inner.p == 0.25
    assert layer.dropout.sizes == [512, -4, 3, "5", "2 ** 9", {"k": 7}, (2,)]
    assert layer.dropout.label == "a-b"


LONGEST = "1+" * 99 + "+1"  # of 200 characters


def test_what_is_arithmetic_and_what_is_kept_as_it_is():
    kept = [b"1 + 1", range(3), 2.5, None, "1", "-1"]
    config = {"__target__": Nested, "inner": nn.Identity(), "sizes": [*kept, LONGEST, "1 - -1"]}
    layer = PointwiseMLP(8, "gelu", config)
    assert layer.dropout.sizes == [*kept, 100, 2]


def test_arithmetic_is_all_that_a_string_can_do():
    for text in (
        "__import__('os').getcwd()",
        "a + 1",
        "'a' * 3",
        "1 if 1 else 2",
        "1 +",
        "1 + (not 2)",
        "1 + ~2",
        "x" * 500,
        LONGEST + "1",
    ):
        layer = PointwiseMLP(
            8, "gelu", {"__target__": Nested, "inner": nn.Identity(), "label": text}
        )
        assert layer.dropout.label == text


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"p": 0.1}, TypeError, "dropout_cfg must be None, an nn.Module, .* got {'p': 0.1}"),
        ({"__target__": "torch.nn.Dropuot"}, ValueError, "importable target, got 'torch.nn.Drop"),
        ({"__target__": "no_such_package.X"}, ValueError, "importable target, got 'no_such"),
        ({"__target__": "..."}, ValueError, r"importable target, got '\.\.\.'"),
        ({"__target__": 3}, ValueError, "callable target, got 3"),
        ({"__target__": DROPOUT, "p": "???"}, ValueError, r"no placeholder .* got '\?\?\?'"),
        ({"__target__": DROPOUT, "p": "${a.b}"}, ValueError, r"interpolation, got '\${a.b}'"),
        ({"__target__": DROPOUT, "p": "1 / 0"}, ValueError, "arithmetic .* got '1 / 0'"),
        ({"__target__": "builtins.dict"}, TypeError, "dropout_cfg must be None"),
        (0.1, TypeError, "dropout_cfg must be None, an nn.Module, .* got 0.1"),
        ("Dropout", TypeError, "dropout_cfg must be None, an nn.Module, .* got 'Dropout'"),
        (dict, TypeError, "dropout_cfg must be None"),
        (KeysAlone(), TypeError, "dropout_cfg must be None, an nn.Module, .* got <.*KeysAlone"),
    ],
)
def test_bad_dropout_configs(config, error, message):
    with pytest.raises(error, match=message) as caught:
        PointwiseMLP(8, "gelu", config)
    assert str(caught.value).startswith("PointwiseMLP: dropout_cfg must ")
