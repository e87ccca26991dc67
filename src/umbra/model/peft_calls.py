"""Calls that PEFT's models have: what a `ShadowModel` answers to those that make no sense for a shadow."""

MERGING = (
    "a shadow cannot be merged into the base's weights: its correction depends on a state that changes with every token. "
    "detached() returns the shadow alone as a stock model; to deploy the pair, serve it attached."
)
UNAVAILABLE = {
    "merge_and_unload": MERGING,
    "merge_adapter": MERGING,
    "unmerge_adapter": MERGING,
    "add_weighted_adapter": "shadows are networks with their own states, which cannot be added up. adapter_names=[…] selects "
    "one for each row of a batch.",
    "peft_config": "the configuration is model.shadow_config, an umbra.ShadowConfig; for another adapter, "
    "model.adapter(name).config.",
    "active_peft_config": "the configuration is model.shadow_config, an umbra.ShadowConfig.",
    "get_peft_config_as_dict": "write model.shadow_config.to_dict().",
    "peft_type": "Umbra's models are no PEFT models; the configuration is model.shadow_config.",
    "enable_adapter_layers": "a shadow runs wherever `with model.disable_adapter():` does not disable it.",
    "disable_adapter_layers": "write `with model.disable_adapter():` for a block of code; unload() removes the shadow for good.",
    "set_requires_grad": "write model.adapter(name).requires_grad_(True).",
    "create_or_update_model_card": "save_pretrained(folder) writes the model card.",
    "get_layer_status": "umbra.adapters.inspect, or `umbra inspect FOLDER`, describes an adapter.",
    "get_model_status": "model.adapters lists the adapters, the active one first.",
}


class AdapterNames(list[str]):
    """Names of adapters. ``active_adapters`` is a property of PEFT's models and a method of transformers'; this serves both."""

    def __call__(self) -> list[str]:
        """Return the names."""
        return list(self)
