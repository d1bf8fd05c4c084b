"""Shared by the profiling tests: configs and geometries by name, the paper's schedule."""

from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling.geometries import find_geometry
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.recipe import default_recipe


def _geometry_data(name, layers):
    data = find_geometry(name)
    return (
        data
        if layers is None
        else {**data, "text_config": {**data["text_config"], "num_hidden_layers": layers}}
    )


def dense_config(name, layers=None):
    from transformers.models.auto import CONFIG_MAPPING

    data = _geometry_data(name, layers)
    return CONFIG_MAPPING[data["model_type"]].from_dict(data)


def pmod_config(name, mod):
    from transformers.models.auto import CONFIG_MAPPING

    data = _geometry_data(name, len(mod.retention_ratios))
    model_type = f"pmod_{data['model_type']}"
    return CONFIG_MAPPING[model_type].from_dict({**data, "model_type": model_type, "mod": mod.to_dict()})


def paper_mod(layers, **changes):
    return MoDConfig(default_recipe().mod.retention_ratios(layers), **changes)


def geometry(name, layers=None):
    return Geometry.from_config(dense_config(name, layers))
