"""What differs between PEFT 0.18.1 and 0.21: no other file of the library depends on PEFT's version.

PEFT 0.21 asks an adapter's model class which tensors to save, and how to name the tensors that are loaded. Older
versions go by the names alone. `install_state_dict_hooks` makes them ask too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

import peft
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from smoa.errors import ConfigError

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

PREFIX = "base_model.model."
"""Prefix of every name in a saved adapter, and of the base model's names inside a PeftModel."""
HAS_STATE_DICT_HOOKS = hasattr(BaseTuner, "_get_adapter_state_dict")  # from 0.21 on
FILTER = "_filter_state_dict_for_adapter_name"  # there from 0.20 on
HAS_QUANTIZATION_BACKENDS = hasattr(BaseTunerLayer, "set_base_weight")  # from 0.20 on

_OWNER = re.compile(
    r"\.(?:smoa_A|smoa_B|smoa_row_labels|smoa_col_labels|smoa_block_scale|modules_to_save|trainable_tokens_\w+)\.([^.]+)"
)
"""The adapter that a tensor belongs to: the name after the first of these parts."""
_LOADING: ContextVar[Any] = ContextVar("smoa_loading", default=None)
"""(model class, model, config) while `set_peft_model_state_dict` loads an adapter whose class has hooks."""


def install_state_dict_hooks() -> None:
    """Make PEFT ≤ 0.20 call a model class's state dict hooks, and later ones give them all tensors. A second call
    replaces the wrappers."""
    wrappers: dict[str, Callable[[Any], Any]] = {
        "get_peft_model_state_dict": _saving,
        "set_peft_model_state_dict": _loading,
        "_insert_adapter_name_into_state_dict": _naming,
    }
    filtering = {FILTER: _filtering} if hasattr(save_and_load, FILTER) else {}
    for name, wrapped in (filtering if HAS_STATE_DICT_HOOKS else wrappers | filtering).items():
        function = getattr(save_and_load, name)
        original = getattr(function, "__smoa_original__", function)
        wrapper = wrapped(original)
        wrapper.__smoa_original__ = original
        for module in list(sys.modules.values()):  # wherever it was imported before smoa
            if getattr(module, "__dict__", {}).get(name) is function:
                setattr(module, name, wrapper)


def refuse_names(configs: Mapping[str, Any]) -> None:
    """Raise ConfigError for the name of an adapter that PEFT ≤ 0.20 takes for a part of a copy's name, so that it saves
    that under another one."""
    has_copies = any(config.modules_to_save or config.trainable_token_indices for config in configs.values())
    odd = [name for name in configs if name in ("weight", "bias") or "smoa_" in name]
    if odd and has_copies and not HAS_STATE_DICT_HOOKS:
        raise ConfigError(
            f"adapter {odd[0]!r}: PEFT {peft.__version__} takes this name for a part of a tensor's, with "
            "modules_to_save or trainable_token_indices; choose another name, or run: pip install -U peft"
        )


def _hooked(config: Any) -> Any:
    """The model class of an adapter if it has state dict hooks."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    return tuner if hasattr(tuner, "_get_adapter_state_dict") else None


def _filtering(original: Callable[..., dict[str, Tensor]]) -> Any:
    @wraps(original)
    def _filter_state_dict_for_adapter_name(state_dict: dict[str, Tensor], unwanted_adapter_names: Any) -> Any:
        """PEFT's, which drops what holds another adapter's name anywhere, and what is no other adapter's: one may be
        called "0" or "mlp", like a part of a module's path."""
        kept = original(state_dict, unwanted_adapter_names)
        others = {*PEFT_TYPE_TO_PREFIX_MAPPING.values()} - {"smoa_", "trainable_tokens_"}
        methods = tuple(f".{prefix}" for prefix in others)

        def may_be_wanted(key: str) -> bool:
            owner = _OWNER.search(key)
            another = owner is not None and owner[1] in unwanted_adapter_names
            return not another and not any(method in key for method in methods)

        return {key: tensor for key, tensor in state_dict.items() if key in kept or may_be_wanted(key)}

    return _filter_state_dict_for_adapter_name


def _saving(original: Callable[..., dict[str, Tensor]]) -> Any:
    @wraps(original)
    def get_peft_model_state_dict(
        model: Any,
        state_dict: dict[str, Tensor] | None = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        save_embedding_layers: Any = "auto",
    ) -> dict[str, Tensor]:
        model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
        config = model.peft_config[adapter_name]
        if (tuner := _hooked(config)) is None:
            return original(model, state_dict, adapter_name, save_embedding_layers=save_embedding_layers)
        state_dict = dict(model.state_dict() if state_dict is None else state_dict)
        own = tuner._get_adapter_state_dict(model, config, adapter_name, state_dict, [])
        rest = {key: tensor for key, tensor in state_dict.items() if not tuner.is_own(key)}
        if config.bias == "all":  # these versions train all with a bias in their name
            own |= {key: each for key, each in rest.items() if "bias" in key and ".modules_to_save." not in key}
        others = original(model, rest, adapter_name, save_embedding_layers=save_embedding_layers)
        return {tuner._remove_adapter_name_from_key(key, adapter_name): each for key, each in own.items()} | others

    return get_peft_model_state_dict


def _loading(original: Callable[..., Any]) -> Any:
    @wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]
        tuner = _hooked(config)
        token = _LOADING.set(None if tuner is None else (tuner, model, config))
        try:
            return original(model, dict(peft_model_state_dict), adapter_name, *args, **kwargs)  # it changes the dict
        finally:
            _LOADING.reset(token)

    return set_peft_model_state_dict


def _naming(original: Callable[..., dict[str, Tensor]]) -> Any:
    @wraps(original)
    def _insert_adapter_name_into_state_dict(
        state_dict: dict[str, Tensor], adapter_name: str, parameter_prefix: str
    ) -> dict[str, Tensor]:
        if _LOADING.get() is None:
            return original(state_dict, adapter_name=adapter_name, parameter_prefix=parameter_prefix)
        tuner, model, config = _LOADING.get()
        named: dict[str, Tensor] = tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if any(name.startswith(PREFIX) for name, _ in model.named_parameters()):
            return named
        return {key.removeprefix(PREFIX): tensor for key, tensor in named.items()}  # as PEFT does from 0.20 on

    return _insert_adapter_name_into_state_dict


class BitsAndBytesBackend:
    """What PEFT's backends for bitsandbytes do from 0.20 on."""

    supports_merge = True

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.backend_name = f"bnb {bits}bit"

    def get_base_weight(self, base: Any) -> Tensor:
        """The dequantized weight."""
        state = base.weight.quant_state if self.bits == 4 else base.state
        weight: Tensor = dequantize_bnb_weight(base.weight, state=state)
        return weight

    def set_base_weight(self, layer: BaseTunerLayer, weight: Tensor) -> None:
        """Quantize a weight again."""
        import bitsandbytes

        bnb: Any = bitsandbytes.nn
        base: Any = layer.get_base_layer()
        old = base.weight
        if self.bits == 8:
            new = bnb.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
            base.weight = new.to(old.device)
            base.state.reset_grads()
            return
        options = {name: value for name, value in vars(old).items() if not name.startswith("_") and name != "data"}
        options |= {"requires_grad": False} | ({"bnb_quantized": False} if "bnb_quantized" in options else {})
        base.weight = bnb.Params4bit(weight.to("cpu"), **options).to(old.device)


def find_quantization_backend(base: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for a quantized layer of `model`, or one that does the same."""
    if HAS_QUANTIZATION_BACKENDS:
        from peft.utils import get_quantization_kwargs, resolve_quantization_backend

        return resolve_quantization_backend(base, **get_quantization_kwargs(model))
    kinds = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(base).__mro__}
    library = {type(base).__module__.split(".")[0], type(getattr(base, "weight", None)).__module__.split(".")[0]}
    if library & {"hqq", "torchao"}:
        raise ValueError(f"HQQ and torchao need PEFT 0.20 or newer, found {peft.__version__}; run: pip install -U peft")
    bits = 4 if "bitsandbytes.Linear4bit" in kinds else 8 if "bitsandbytes.Linear8bitLt" in kinds else None
    return None if bits is None else BitsAndBytesBackend(bits)  # type: ignore[return-value]  # it has what we call
