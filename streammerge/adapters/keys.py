"""The key grammar of PEFT's adapter files: the one place that knows how a key is spelt.

```
[prefix]<module>.<factor>[.name][.weight|.bias|.part]     a factor: lora_A, hada_w1_a, oft_R, ...
[prefix]<module>.(base_layer.)*<factor>...                the same of a wrapped parameter
[prefix]<module>.base_layer.<module>.<factor>...          of a layer inside a wrapped one
[prefix]<module>.[token_adapter.]trainable_tokens_delta   rows of an embedding
[prefix]<module>.base_layer.<param>                       copy of the base tensor to start from
[prefix]<module>.modules_to_save[.name].<param>           twin of a replacement
[prefix]<module>.original_module.<param>                  twin of the base
[prefix]<module>.<param>                                  replacement: modules_to_save, biases,
                                                          resized vocabulary
base_model.<shared>[.name][.part]                         a tensor that all modules share
```
`prefix` is `base_model.model.`; what wrappers leave behind (`_orig_mod.`, `module.`, a doubled
prefix, the adapter's name) is taken away. Which words are factors is the tuner's to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from streammerge.adapters.tuners import foreign_factors
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from streammerge.adapters.tuners.base import Tuner

__all__ = ["AdapterKey", "Role", "parse_key"]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LEADING = ("base_model.model.", "module.", "base_model.")
_TRAINED_ROWS = "trainable_tokens_delta"
_ENDS = frozenset({"weight", "bias"})
_WRAPPED = "base_layer"


class Role(Enum):
    """What an adapter tensor is for."""

    FACTOR = "factor"
    SHARED = "shared"
    TRAINED_ROWS = "rows of tokens"
    BASE_COPY = "base_layer"
    REPLACEMENT = "replacement"
    SAVED_TWIN = "modules_to_save"
    ORIGINAL_TWIN = "original_module"


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """A parsed key."""

    role: Role
    module: str
    """Path of the module in memory, without prefix."""
    name: str = ""
    """The factor's name (`lora_A`, `lora_B.bias`), or that of a whole parameter (`weight`)."""
    depth: int = 0
    """How many `base_layer.` stand before the factor."""
    is_inner: bool = False
    """Whether the path leads through a `base_layer.`."""

    @property
    def path(self) -> str:
        """Path of the parameter that a whole tensor stands for."""
        return f"{self.module}.{self.name}" if self.module else self.name


def parse_key(key: str, tuner: Tuner) -> AdapterKey:
    """Parse one key of an adapter file.

    Args:
        key: The key as it stands.
        tuner: The kind of adapter.

    Raises:
        AdapterError: The key belongs to another kind of adapter, or has no form that is known.
    """
    parts = _strip(key).split(".")
    for at, part in enumerate(parts):
        # of RandLoRA, each module has copies of what all share
        if part in tuner.shared and at == 0:
            names = _without_adapter_name(key, parts[1:], tuner)
            return AdapterKey(Role.SHARED, "", ".".join([part, *names]))
        if part in tuner.factors:
            return _parse_factor(key, parts, at, tuner)
    found = next((part for part in parts if part in foreign_factors(tuner.peft_type)), None)
    if found is not None:
        raise _foreign(key, found)
    return _parse_whole(key, parts, tuner)


def _foreign(key: str, part: str) -> AdapterError:
    return AdapterError(
        "adapter holds a tensor of another kind of adapter than its peft_type says",
        where=f"key '{key}'",
        got=part,
        hint="adapter_config.json belongs to another adapter?",
    )


def _strip(key: str) -> str:
    name = key
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while True:
        # the longest first: what is left of `base_model.model.` must not be taken for `base_model.`
        prefix = next((prefix for prefix in _LEADING if name.startswith(prefix)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def _parse_factor(key: str, parts: list[str], at: int, tuner: Tuner) -> AdapterKey:
    module = parts[:at]
    depth = 0
    while module and module[-1] == _WRAPPED:
        module.pop()
        depth += 1
    is_inner = _WRAPPED in module
    module = [part for part in module if part != _WRAPPED]
    if not module:
        raise AdapterError("adapter key has an unknown form", where=f"key '{key}'")
    names = _without_adapter_name(key, parts[at + 1 :], tuner)
    if names[-1:] == ["weight"]:
        names.pop()
    name = ".".join([parts[at], *names])
    return AdapterKey(Role.FACTOR, ".".join(module), name, depth, is_inner)


def _without_adapter_name(key: str, names: list[str], tuner: Tuner) -> list[str]:
    """Take away the adapter's name, which may be left in after the factor's."""
    known = [name for name in names if name in _ENDS or name in tuner.parts or name.isdecimal()]
    if len(names) - len(known) > 1 and not tuner.has_free_parts:
        raise AdapterError("adapter key has an unknown form", where=f"key '{key}'")
    return names if tuner.has_free_parts else known


def _parse_whole(key: str, parts: list[str], tuner: Tuner) -> AdapterKey:
    *module, name = parts
    if name == _TRAINED_ROWS or (module and module[-1] == _TRAINED_ROWS):
        # with an adapter's name after it
        module = module[:-1] if name != _TRAINED_ROWS else module
        module = module[:-1] if module and module[-1] == "token_adapter" else module
        return AdapterKey(Role.TRAINED_ROWS, ".".join(module), _TRAINED_ROWS)
    if _WRAPPED in module:
        # of a layer inside a wrapped one too: the output projection of an attention
        before = [path.split(".") for path in ".".join(module[:-1]).split(f".{_WRAPPED}.")]
        if module[-1] != _WRAPPED or any(_WRAPPED in path for path in before):
            raise AdapterError("adapter key has an unknown form", where=f"key '{key}'")
        path = [part for parts in before for part in parts]
        return AdapterKey(Role.BASE_COPY, ".".join(path), name)
    for role in (Role.SAVED_TWIN, Role.ORIGINAL_TWIN):
        if role.value in module:
            at = len(module) - 1 - module[::-1].index(role.value)
            rest = module[at + 1 :]
            # an adapter's name may stand first in what follows, but only beside modules_to_save
            if role is Role.SAVED_TWIN and "default" in rest[:1]:
                rest = rest[1:]
            return AdapterKey(role, ".".join(module[:at]), ".".join([*rest, name]))
    # what is trained in place of a whole layer
    kept = [part for part in module if part not in tuner.replaces]
    return AdapterKey(Role.REPLACEMENT, ".".join(kept), name)
