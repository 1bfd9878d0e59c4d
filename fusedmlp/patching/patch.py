"""patch(), unpatch(), patched(), register_patch(): which modules, and why not the others."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .experts import register_experts
from .quantize import quantize_model
from .report import Entry, Report
from .swap import restore
from .walk import REGISTERED, Adapter, Only, Walk, checked

_NOTHING = "no projection was found that leads to another, and no experts"


def register_patch(cls: type[nn.Module], adapter: Adapter) -> None:
    """Let patch() handle modules whose class is exactly `cls` by `adapter`.

    Args:
        cls: a class of modules. A second adapter for it replaces the first.
        adapter: called with a module; returns a `fusedmlp.patching.Plan`, or a str: why the module
            is left. A plan is frozen and picklable; its `run(module, *args)` becomes the forward.

    Only what the data flow of a forward does not show needs this: see fusedmlp/patching/match.py.
    Raises TypeError for other arguments.

    Examples:
        >>> from torch import nn
        >>> import fusedmlp
        >>> class Routed(nn.Sequential):
        ...     pass
        >>> fusedmlp.register_patch(Routed, lambda module: "its router is read elsewhere")
        >>> report = fusedmlp.patch(Routed(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
        >>> [entry.detail for entry in report.left]
        ['its router is read elsewhere']
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_patch: cls must be a class of nn.Modules, got {cls!r}")
    if not callable(adapter):
        raise TypeError(f"register_patch: adapter must be callable, got {adapter!r}")
    REGISTERED[cls] = adapter


def patch(
    model: nn.Module,
    *,
    only: Only = None,
    dtype_check: bool = True,
    quantize: str | None = None,
    recompute: bool = False,
    batch_invariant: bool = False,
) -> Report:
    """Run the MLPs of `model` through fusedmlp, in place: gated_mlp, mlp, moe_mlp.

    An MLP is found by what a forward computes, or a part of it, whatever the names: Llama, Qwen,
    Gemma, GPT-2, BERT, ViT, OPT, Whisper and most others of transformers, and your own. So are
    the experts of transformers' table (Mixtral, Qwen3, DeepSeek, gpt-oss and about sixty families
    more), with their clamps; Switch and Llama 4 are known by their classes.

    Args:
        model: any nn.Module, on any device, meta too. Patch before parallelize_module, fully_shard
            and torch.compile; optimisers, checkpoints and hooks on the MLPs do not care.
        only: names of modules to look at, as patterns of fnmatch ("model.layers.0.*"), or a
            function of name and module. Default: all.
        dtype_check: leave an MLP whose parameters differ in dtype or have one that no kernel takes;
            False patches it all the same, and its call says what is wrong.
        quantize: "q1_0" puts every gated MLP of a Llama-type model into one bit a weight first, by
            `quantize_model`; for good, which unpatch() does not undo. Not together with `only`. The
            report lists the blocks among the patched, then and later.

        recompute: gated MLPs save their input alone for backward and compute g and u again there,
            2 H values a token less for 4 D H FLOPs a token more; the report says which. A block
            that was patched before stays as it is.
        batch_invariant: the patched modules run inside `batch_invariant()`, whoever calls them. A
            call of one whose projections are not all fused raises TypeError. The rest of the model
            promises nothing by it.

    Parameters, state_dict keys, hooks, device, dtype and the modules themselves stay. An MLP is
    left where a fused call would be something else: a projection that is tied, a dtype or an
    activation without a kernel. Projections that are quantised, adapted or hooked, then or later,
    are called, and what lies between them is fused. A second patch() changes nothing.

    Returns a `Report`, a line for each module. Raises ValueError for a model that is wrapped by FSDP,
    distributed or compiled, for a pattern that matches nothing and for no pattern; TypeError for
    another type of an argument; with `quantize` what quantize_model raises.

    Examples:
        >>> from torch import nn
        >>> import fusedmlp
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = fusedmlp.patch(model)
        >>> [entry.op for entry in report.patched], len(report.left)
        (['mlp'], 0)
    """  # noqa: E501
    checked("patch", model)
    if quantize is None:
        return _run(model, only, dtype_check, recompute, batch_invariant)[0]
    if only is not None:
        raise ValueError(f"patch: only must be None with quantize={quantize!r}, got {only!r}")
    if batch_invariant:
        raise ValueError(
            f"patch: batch_invariant must be False with quantize={quantize!r}, got True; one-bit "
            "layers keep the promise inside `with fusedmlp.batch_invariant()`"
        )
    quantized = quantize_model(model, format=quantize)
    return dataclasses.replace(_run(model, only, dtype_check, recompute)[0], quantized=quantized)


def _run(
    model: nn.Module,
    only: Only,
    dtype_check: bool,
    recompute: bool = False,
    invariant: bool = False,
) -> tuple[Report, list[nn.Module]]:
    options = {"dtype_check": dtype_check, "recompute": recompute, "batch_invariant": invariant}
    for name, given in options.items():
        if not isinstance(given, bool):
            raise TypeError(f"patch: {name} must be True or False, got {given!r}")
    register_experts()
    walk = Walk(model, only, dtype_check, recompute, invariant)
    try:
        walk.visit("", model)
    except BaseException:
        restore("patch", walk.swapped)
        raise
    if not walk.entries:
        walk.entries.append(Entry("", type(model).__name__, None, None, _NOTHING))
    return Report(tuple(walk.entries)), walk.swapped


def unpatch(model: nn.Module) -> None:
    """Undo patch(): every module of `model` runs its own forward again, and Switch's experts have
    memories of their own again. Nothing else changes.

    Raises ValueError, as patch() does, where the model was wrapped meanwhile.

    Examples:
        >>> from torch import nn
        >>> import fusedmlp
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = fusedmlp.patch(model)
        >>> fusedmlp.unpatch(model)
        >>> type(model) is nn.Sequential
        True
    """
    restore("unpatch", checked("unpatch", model).modules())


@contextmanager
def patched(model: nn.Module, *, only: Only = None, dtype_check: bool = True) -> Iterator[Report]:
    """patch() for the length of a with block, whatever ends it; gives the report.

    What was patched before stays patched. Arguments and errors as in patch(). Raises ValueError at
    the end for a module that was wrapped inside (fully_shard), when all others are restored; a
    warning where the block already ends in an exception.

    Examples:
        >>> from torch import nn
        >>> import fusedmlp
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> with fusedmlp.patched(model) as report:
        ...     len(report.patched), type(model) is nn.Sequential
        (1, False)
        >>> type(model) is nn.Sequential
        True
    """
    report, swapped = _run(checked("patched", model), only, dtype_check)
    try:
        yield report
    except BaseException:
        try:
            restore("patched", swapped)
        except ValueError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)
        raise
    restore("patched", swapped)
