"""Ways in which users carry a layer's state: each takes a layer and another of the same arguments,
and returns a layer, perhaps the other one, that must have the first one's state."""

import copy
import pickle

import accelerate
import safetensors.torch
import torch
from accelerate.utils import load_checkpoint_in_model
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from transformers import PretrainedConfig, PreTrainedModel


def torch_save(layer, other, folder):
    torch.save(layer.state_dict(), folder / "state.pt")
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return other


def torch_mmap(layer, other, folder):
    """The parameters become those of the file, which is not read yet."""
    torch.save(layer.state_dict(), folder / "state.pt")
    state = torch.load(folder / "state.pt", weights_only=True, mmap=True)
    other.load_state_dict(state, assign=True)
    for name, p in other.named_parameters():
        assert p.data_ptr() == state[name].data_ptr(), name
    return other


def safetensors_file(layer, other, folder):
    safetensors.torch.save_file(layer.state_dict(), folder / "state.safetensors")
    other.load_state_dict(safetensors.torch.load_file(folder / "state.safetensors"))
    return other


def safetensors_model(layer, other, folder):
    safetensors.torch.save_model(layer, folder / "model.safetensors")
    assert safetensors.torch.load_model(other, folder / "model.safetensors") == (set(), [])
    return other


def accelerate_model(layer, other, folder):
    accelerate.Accelerator(cpu=True).save_model(layer, folder)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(saved) == set(layer.state_dict())
    load_checkpoint_in_model(other, folder)
    return other


def accelerate_state(layer, other, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.free_memory()  # what another test prepared
    prepared = accelerator.prepare(layer)
    accelerator.save_state(folder)
    kept = copy.deepcopy(layer)
    prepared.load_state_dict(other.state_dict())
    accelerator.load_state(folder)
    layer.load_state_dict(kept.state_dict())
    accelerator.free_memory()
    return prepared


def accelerate_offload(layer, other, folder):
    """Each module's parameters come when it is called, and go."""
    other.load_state_dict(layer.state_dict())
    return accelerate.cpu_offload(other, execution_device="cpu")


class Config(PretrainedConfig):
    model_type = "one_layer"


class Held(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.layer = type(self).make()
        self.post_init()


def transformers_model(layer, other, folder):
    model = type("Held", (Held,), {"make": staticmethod(lambda: copy.deepcopy(other))})
    saved = model(Config())
    saved.layer.load_state_dict(layer.state_dict())
    saved.save_pretrained(folder)
    loaded, info = model.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return loaded.layer


def hub_mixin(layer, other, folder):
    class Hub(nn.Module, PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(other)

    saved = Hub()
    saved.layer.load_state_dict(layer.state_dict())
    saved.save_pretrained(folder)
    return Hub.from_pretrained(folder).layer


def checkpoint_api(layer, other, folder):
    """What torch.distributed.checkpoint reads and writes, by parameters' names."""
    set_model_state_dict(other, get_model_state_dict(layer))
    return other


def averaged(layer, other, folder):
    average = AveragedModel(other, avg_fn=lambda old, new, count: new)
    average.update_parameters(other)
    average.update_parameters(layer)
    again = AveragedModel(copy.deepcopy(other))
    again.load_state_dict(average.state_dict())
    return again.module


class Called(nn.Module):
    """`layer` with the parameters and buffers of another."""

    def __init__(self, layer, state):
        super().__init__()
        self.layer, self.state = layer, state

    def forward(self, x):
        return functional_call(self.layer, self.state, (x,))


def functional(layer, other, folder):
    return Called(other, {**dict(layer.named_parameters()), **dict(layer.named_buffers())})


def copied(layer, other, folder):
    return copy.deepcopy(pickle.loads(pickle.dumps(layer)))


def shared(layer, other, folder):
    other.load_state_dict(layer.state_dict())
    other.share_memory()
    assert all(p.is_shared() for p in other.parameters())
    return other


def moved(layer, other, folder):
    other.load_state_dict(layer.state_dict())
    return other.double().to("cpu").float()


SAVERS = (torch_save, torch_mmap, safetensors_file, safetensors_model, accelerate_model,
          accelerate_state, accelerate_offload, transformers_model, hub_mixin, checkpoint_api,
          averaged, functional, copied, shared, moved)  # fmt: skip
