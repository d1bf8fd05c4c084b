"""Shared by the profiling tests: configs and geometries by name, the paper's schedule."""

from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling.geometry import Geometry, find_geometry
from pmod_cli.recipe import default_recipe


def _geometry_data(name, layers):
    data = find_geometry(name)["config"]
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
    return Geometry.from_config(_geometry_data(name, layers))


def tiny_raw(model_type="llava", text=None):
    """config.json of a LLaVA of a few thousand parameters: 16 vision tokens a crop, 4 layers, grouped queries."""
    raw = {
        "model_type": model_type,
        "image_token_index": 60,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 512,
            **(text or {}),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
            "num_channels": 3,
            "projection_dim": 8,
        },
    }
    if model_type == "llava_next":
        raw["image_grid_pinpoints"] = [[16, 32], [32, 16], [32, 32]]
    return raw


TINY_MOD = MoDConfig([None, 0.7, 0.5, 0.3])


def profile_checkpoint(model, baseline="auto", *, progress=None, **options):
    """What ``pmod profile`` does with a checkpoint, a config.json or a name."""
    from pmod_cli.profiling.options import ProfileOptions
    from pmod_cli.profiling.profile import profile
    from pmod_cli.profiling.subject import find_subject

    return profile(find_subject(str(model), baseline=baseline), ProfileOptions(**options), progress)


def save_tiny(folder, model_type="llava", mod=None, text=None):
    """A checkpoint folder with random weights; dense unless ``mod`` is given."""
    import torch
    from transformers.models.auto import CONFIG_MAPPING, AutoModelForImageTextToText

    raw = tiny_raw(model_type, text)
    if mod is not None:
        raw |= {"model_type": f"pmod_{model_type}", "mod": mod.to_dict()}
    torch.manual_seed(1)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model
