"""What the configuration of a model says about its rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._problem.arguments import integer, real, shown
from ._rotary_scaling import LinearScaling, Llama3Scaling, NTKScaling, Scaling, YaRNScaling


class Keys:
    """What a config says about rotary embeddings, wherever it says it."""

    def __init__(self, config: Mapping[str, Any], layer_type: str | None) -> None:
        self.config = config
        self.name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        rope = config.get(self.name) or {}
        if not isinstance(rope, Mapping):
            raise TypeError(f"config['{self.name}'] is {shown(rope)}: it must be a mapping or None")
        types = [key for key, value in rope.items() if isinstance(value, Mapping)]
        if types:
            if layer_type not in types:
                raise ValueError(
                    f"layer_type is {shown(layer_type)}: config['{self.name}'] has parameters for "
                    f"each type of layer, so it must be one of {', '.join(map(repr, types))}"
                )
            rope = rope[layer_type]
            self.name += f"']['{layer_type}"
        elif layer_type is not None:
            raise ValueError(
                f"layer_type is {shown(layer_type)}: the config has the same parameters for all "
                "layers, so it must be None"
            )
        self.rope = rope

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of `rope_parameters`, else of the config; None counts as missing."""
        for place in (self.rope, self.config):
            if place.get(key) is not None:
                return place[key]
        return default

    def need(self, key: str) -> Any:
        """Return a value that must be there."""
        found = self.get(key)
        if found is None:
            raise ValueError(f"config has no '{key}', which is needed")
        return found

    def scaling(self) -> Scaling | None:
        """Return the scaling that the config asks for."""
        kind = self.rope.get("rope_type") or self.rope.get("type") or "default"
        if self.rope.get("mrope_section") is not None:
            kind = "mrope"
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(self.factor())
        if kind == "dynamic":
            return NTKScaling(self.factor(), self.context("max_position_embeddings"))
        if kind == "yarn":
            return self.yarn()
        if kind == "llama3":
            low, high = self.need("low_freq_factor"), self.need("high_freq_factor")
            return Llama3Scaling(self.factor(), low, high, self.original_context())
        raise ValueError(
            f"config['{self.name}'] has the type {shown(kind)}, which is not supported: it must be "
            "default, linear, dynamic, yarn or llama3"
        )

    def factor(self) -> float:
        return real("factor", self.need("factor"))

    def context(self, key: str) -> int:
        return integer(f"config['{key}']", self.need(key))

    def original_context(self) -> int:
        key = "original_max_position_embeddings"
        for place in (self.config, self.rope):
            if place.get(key) is not None:
                return integer(f"config['{key}']", place[key])
        return self.context("max_position_embeddings")

    def yarn(self) -> YaRNScaling:
        original = self.original_context()
        factor = self.get("factor")
        if factor is None:
            factor = self.context("max_position_embeddings") / original
        return YaRNScaling(
            factor,
            original,
            beta_fast=self.rope.get("beta_fast") or 32.0,
            beta_slow=self.rope.get("beta_slow") or 1.0,
            attention_factor=self.rope.get("attention_factor"),
            mscale=self.rope.get("mscale"),
            mscale_all_dim=self.rope.get("mscale_all_dim"),
            truncate=self.rope.get("truncate", True),
        )
