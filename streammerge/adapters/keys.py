"""The key grammar of PEFT's adapter files: the one place that knows how a key is spelt.

```
[prefix]<module>.lora_A[.name].weight  | lora_B[.name].weight | lora_B[.name].bias    Linear, Conv1D
[prefix]<module>.lora_embedding_A[.name] | lora_embedding_B[.name]                    Embedding
[prefix]<module>.lora_magnitude_vector[.name][.weight]                                DoRA
[prefix]<module>.base_layer.<param>            copy of the base tensor to start from
[prefix]<module>.modules_to_save[.name].<param> | .original_module.<param>            twins
[prefix]<module>.<param>                       replacement: modules_to_save, biases, resized
vocabulary
```
`prefix` is `base_model.model.`; what wrappers leave behind (`_orig_mod.`, `module.`, a doubled
prefix, the adapter's name) is taken away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from streammerge.errors import AdapterError

__all__ = ["AdapterKey", "Role", "parse_key"]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LEADING = ("base_model.model.", "module.", "base_model.")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<rest>(\.[^.]+)*)"
)
# markers of tensors that another formula needs
_FOREIGN = re.compile(
    r"\.(lora_diag|token_adapter|trainable_tokens_delta|lora_velora_embed|lora_monteclora_sampler|"
    r"hada_\w+|lokr_\w+|lora_E|ia3_l|oft_R|oft_embedding_R|boft_R|boft_s|vera_\w+|"
    r"prompt_encoder|lora_ga\w*|lora_A_\w+|lora_B_\w+)(\.|$)"
)


class Role(Enum):
    """What an adapter tensor is for."""

    LORA_A = "lora_A"
    LORA_B = "lora_B"
    LORA_B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
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
    parameter: str = ""
    """`weight` or `bias`, for the roles that carry a whole tensor."""

    @property
    def path(self) -> str:
        """Path of the parameter that a whole tensor stands for."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def parse_key(key: str) -> AdapterKey:
    """Parse one key of an adapter file.

    Raises:
        AdapterError: The key belongs to a variant that is not supported.
    """
    name = _strip(key)
    foreign = _FOREIGN.search("." + name)
    if foreign:
        raise AdapterError(
            "adapter holds a tensor of a variant that is not merged by this version",
            where=f"key '{key}'",
            got=foreign.group(1),
            hint="merge it with PEFT",
        )
    match = _FACTOR.fullmatch(name)
    if match:
        return _parse_factor(key, match)
    module, _, parameter = name.rpartition(".")
    if ".base_layer." in f".{name}":
        if module.endswith(".base_layer") or module == "base_layer":
            return AdapterKey(
                Role.BASE_COPY, module.removesuffix("base_layer").rstrip("."), parameter
            )
        raise AdapterError("adapter key has an unknown form", where=f"key '{key}'")
    parts = module.split(".")
    for role in (Role.SAVED_TWIN, Role.ORIGINAL_TWIN):
        if role.value in parts:
            at = len(parts) - 1 - parts[::-1].index(role.value)
            rest = parts[at + 1 :]
            # an adapter's name may stand first in what follows, but only beside modules_to_save
            if role is Role.SAVED_TWIN and rest and "default" in rest[:1]:
                rest = rest[1:]
            return AdapterKey(role, ".".join(parts[:at]), ".".join([*rest, parameter]))
    return AdapterKey(Role.REPLACEMENT, module, parameter)


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


def _parse_factor(key: str, match: re.Match[str]) -> AdapterKey:
    module, role = match["module"], Role(match["role"])
    rest = match["rest"].split(".")[1:]
    last = rest[-1] if rest and rest[-1] in {"weight", "bias"} else None
    names = rest[:-1] if last else rest
    if len(names) > 1 or (last == "bias" and role is not Role.LORA_B):
        raise AdapterError("adapter key has an unknown form", where=f"key '{key}'")
    if role in {Role.LORA_A, Role.LORA_B} and last is None:
        raise AdapterError("adapter key has an unknown form", where=f"key '{key}'")
    if module.endswith(".base_layer") or module == "base_layer" or ".base_layer." in module:
        raise AdapterError(
            "adapter wraps a parameter (nn.MultiheadAttention or fused experts), which is not "
            "merged by this version",
            where=f"key '{key}'",
            hint="merge it with PEFT",
        )
    return AdapterKey(Role.LORA_B_BIAS if last == "bias" else role, module)
