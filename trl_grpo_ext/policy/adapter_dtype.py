"""Adapter weights in float32, whatever the base is kept in.

A step of 1e-6 on a weight of 0.01 is below what bfloat16 can tell apart, so an adapter in 16 bits hardly moves (see
`update_lost.py`). In float32 it moves; it is computed in the dtype of the base all the same. Of LoRA layers that is
`fused.py`'s work; here it is that of whole modules which are trained beside them (`modules_to_save`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Cast what trains to float32, in place; the parameters stay the objects that they are. Idempotent.

    Raises:
        ValueError: for a bias of a 16-bit base that trains (`LoraConfig(bias=...)`): it is part of the base's layer,
            which computes with it as it is.
    """
    for name, parameter in _trained_base(model):
        if parameter.is_floating_point() and parameter.element_size() < 4:
            raise ValueError(
                f"{name} is a {parameter.dtype} parameter of the base, and trains: most of its updates would be lost "
                "to rounding, and it cannot be kept in float32 within a layer of that dtype. Set bias='none' in the "
                "LoraConfig, or load the base in float32."
            )
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                _compute_as_before(copy)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.element_size() < 4:
            parameter.data = parameter.data.float()


def trains_base(model: PeftModel) -> bool:
    """Whether parameters of the base itself train beside the adapter (`LoraConfig(bias=...)`)."""
    return any(True for _ in _trained_base(model))


def _trained_base(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    own = {id(parameter) for parameter in _adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            yield name, parameter


def _adapter_parameters(model: PeftModel) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(parameter) for parameter in module.get_base_layer().parameters()}
            found += [parameter for parameter in module.parameters() if id(parameter) not in base]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base = {id(parameter) for parameter in module.original_module.parameters()}
            found += [parameter for parameter in module.parameters() if id(parameter) not in base]
    return found


def _compute_as_before(module: nn.Module) -> None:
    """Let a module compute with its parameters cast to the dtypes that they have now."""
    dtypes = {name: p.dtype for name, p in module.named_parameters() if p.is_floating_point() and p.element_size() < 4}
    if not dtypes:
        return
    usual = type(module).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not through `self.forward`, which is this function; a copy of the module has its own
        parameters = {name: p.to(dtypes.get(name, p.dtype)) for name, p in self.named_parameters()}
        return functional_call(_Bare(self, usual), {f"module.{n}": p for n, p in parameters.items()}, args, kwargs)

    module.forward = types.MethodType(forward, module)


class _Bare(nn.Module):
    """`module` with the `forward` of its class."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.module, *args, **kwargs)
