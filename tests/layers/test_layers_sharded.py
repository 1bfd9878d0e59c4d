"""torch.distributed.checkpoint with FSDP2: what two ranks write is read by four."""

import functools

import torch
import torch.distributed.checkpoint as dcp
from layer_checks import draw, one
from layer_makers import MAKERS, D
from ranks import spawn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

SHARDED = ("SwitchFFN", "FastFeedForward all", "PathWeightedFFF", "Top1MoE", "TopKMoE all",
           "FeedForward gated")  # fmt: skip
FULL = StateDictOptions(full_state_dict=True)


def trained(name, seed):
    torch.manual_seed(seed)
    layer = fully_shard(MAKERS[name]())
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
    one(layer(draw(2, 4, D))).square().sum().backward()
    optimizer.step()
    return layer.eval(), optimizer


def states(layer, optimizer, options=None):
    return {
        "model": get_model_state_dict(layer, options=options),
        "optimizer": get_optimizer_state_dict(layer, optimizer, options=options),
    }


def write(folder, rank, ranks):
    for name in SHARDED:
        layer, optimizer = trained(name, 0)
        dcp.save(states(layer, optimizer), checkpoint_id=folder / name)
        full = states(layer, optimizer, FULL)
        if rank == 0:
            torch.save({**full, "y": one(layer(draw(2, 4, D))).detach()}, folder / f"{name}.pt")
        else:
            layer(draw(2, 4, D))  # every rank gathers


def read(folder, rank, ranks):
    for name in SHARDED:
        layer, optimizer = trained(name, 1)
        state = states(layer, optimizer)
        dcp.load(state, checkpoint_id=folder / name)
        set_model_state_dict(layer, state["model"])
        set_optimizer_state_dict(layer, optimizer, state["optimizer"])
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        full, y = states(layer, optimizer, FULL), one(layer(draw(2, 4, D)))
        assert torch.equal(y, expected["y"]), name
        if rank == 0:
            assert full["model"].keys() == expected["model"].keys()
            for key, t in full["model"].items():
                assert torch.equal(t, expected["model"][key]), f"{name} {key}"
            for key, kept in full["optimizer"]["state"].items():
                for moment, t in kept.items():
                    assert torch.equal(t, expected["optimizer"]["state"][key][moment]), key


def test_a_checkpoint_of_two_ranks_is_read_by_four(tmp_path):
    spawn(2, functools.partial(write, tmp_path))
    spawn(4, functools.partial(read, tmp_path))
