"""What may stand in the place of a projection, so that it has to be called: `CALLED`, name -> what
does it to the submodule at a path of a model, and what a report then says of it."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune

HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


class Scaled(nn.Linear):
    def forward(self, t):
        return 2 * super().forward(t)


class Quantised(nn.Module):
    """Values of one byte, and no sizes."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", (linear.weight.detach() * 100).round().to(torch.int8))

    def forward(self, t):
        return t @ (self.qweight.T.to(t.dtype) / 100)


class Sized(Quantised):
    def __init__(self, linear):
        super().__init__(linear)
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features


class OwnParameter(nn.Parameter):
    """As a quantised one that passes for a floating tensor."""


class Adapter(nn.Module):
    """A low-rank update around a projection, by nobody we know."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, t):
        return self.base(t) + self.b(self.a(t))


def put(make):
    """Puts make(the projection) in its place."""

    def change(model, path):
        above, _, key = path.rpartition(".")
        holder = model.get_submodule(above)
        holder._modules[key] = make(holder._modules[key])

    return change


def scaled(linear):
    twin = Scaled(linear.in_features, linear.out_features)
    twin.load_state_dict(linear.state_dict())
    return twin


def on_it(act):
    return lambda model, path: act(model.get_submodule(path))


def with_hook(kind):
    return on_it(lambda m: getattr(m, f"register_{kind}")(lambda *_: None))


def with_forward(linear):
    forward = linear.forward
    linear.forward = lambda t: 2 * forward(t)


def own_class(linear):
    linear.weight = OwnParameter(linear.weight.detach())


def by_accelerate(linear):
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def dora(model, path):
    config = LoraConfig(r=2, target_modules=[path], init_lora_weights=False, use_dora=True)
    inject_adapter_in_model(config, model)


def gathered(module):
    """As ZeRO-3 does it: between calls there is no weight."""
    parameters = dict(module.named_parameters(recurse=False))
    whole = {name: p.data for name, p in parameters.items()}

    def gather(*_):
        for name, p in parameters.items():
            p.data = whole[name]

    def release(*_):
        for p in parameters.values():
            p.data = p.data.new_empty(0)

    for hook in (gather, release):
        hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    release()
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)


CALLED = {
    "a subclass": (put(scaled), r"is a patch_called\.Scaled"),
    "quantised": (put(Quantised), r"is a patch_called\.Quantised"),
    "quantised, sized": (put(Sized), r"is a patch_called\.Sized"),
    "an adapter": (put(Adapter), r"is a patch_called\.Adapter"),
    "peft, DoRA": (
        dora,
        r"is a peft\.tuners\.lora\.layer\.Linear whose adapter 'default' is a Dora",
    ),
    **{kind: (with_hook(kind), "has hooks") for kind in HOOKS},
    "a forward": (on_it(with_forward), "has a forward of its own, set on the instance"),
    "a class of weights": (on_it(own_class), r"a patch_called\.OwnParameter of torch\.float32"),
    "accelerate": (on_it(by_accelerate), "has accelerate's AlignDevicesHook around it"),
    "ZeRO-3": (on_it(gathered), "has DeepSpeed's hooks"),
    "pruned": (on_it(lambda m: prune.l1_unstructured(m, "weight", 0.3)), "has hooks"),
    "weight_norm": (on_it(parametrizations.weight_norm), "computes its weight on access"),
}
