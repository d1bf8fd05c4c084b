"""The entry point ``lmms_eval.models``: lets ``lmms-eval eval --model pmod`` find our model."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="pmod", simple_class_path="pmod_cli.evaluation.adapter.PmodLmms")
