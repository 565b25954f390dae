"""Settings of layers and configuration, by which models with the same parameters compute different things."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_GENERAL = {*PreTrainedConfig().to_dict(), "bos_token_id", "eos_token_id", "use_cache", "initializer_range"}
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def architecture(model: nn.Module) -> dict[str, str]:
    """Settings by name, JSON-safe: values of the configuration and its adapters, and how each layer is built."""
    found = dict(_settings("config", getattr(model, "config", None)))
    for adapter, config in getattr(model, "peft_config", {}).items():
        found |= {
            f"adapter {adapter}.{name}": json.dumps(value)
            for name, value in vars(config).items()
            if isinstance(value, int | float) and name != "inference_mode" and not _only_trains(name)
        }
    for name, module in model.named_modules():
        numbers = {key: value for key, value in vars(module).items() if type(value) is float and not _only_trains(key)}
        layer = f"{type(module).__name__}({module.extra_repr()})" if not [*module.children()] else ""
        if (layer or numbers) and not _only_trains(layer):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found[name] = f"{layer} {json.dumps(numbers, sort_keys=True)}"
    return found


def difference(recorded: Mapping[str, Any], model: nn.Module) -> str | None:
    """The first setting of a model that is not as recorded, in words."""
    found = architecture(model)
    for name in sorted({*recorded, *found}, key=lambda name: (not name.startswith("config."), name)):
        if recorded.get(name) != found.get(name):
            return f"`{name}` is {found.get(name, 'missing')}, recorded was {recorded.get(name, 'nothing')}"
    return None


def _settings(name: str, config: Any) -> dict[str, str]:
    """Values of a configuration that are the architecture's own; nested ones are spread out."""
    content = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _settings(f"{name}.{key}", value) if key not in _GENERAL else {}
        elif key not in _GENERAL and not _only_trains(key):
            found[f"{name}.{key}"] = json.dumps(value, default=str)
    return found


def _only_trains(name: str) -> bool:
    """Whether a setting is one of dropout, which is off in attributions."""
    return "drop" in name.lower()
