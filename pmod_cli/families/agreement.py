"""Whether a checkpoint's model and processor belong together; old processors lack what the model's config tells."""

from __future__ import annotations

from typing import Any

from pmod_cli.output.errors import PmodError, told_as


@told_as("the checkpoint's processor and config do not fit")
def agree(config: Any, processor: Any) -> Any:
    """The processor, with what its files lack filled in from the model's config.

    Raises:
        PmodError: They differ in the image token, the vocabulary, or how many tokens a picture takes.
    """
    vision = config.vision_config
    side, patch = (_one(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    extra = int(vision.model_type == "clip_vision_model")  # the class token
    strategy = getattr(config, "vision_feature_select_strategy", None)
    for name, expected in (
        ("patch_size", patch),
        ("vision_feature_select_strategy", strategy),
        ("num_additional_image_tokens", extra),
        ("num_image_tokens", (side // patch) ** 2 if side and patch else None),
    ):
        if not hasattr(processor, name) or expected is None:
            continue
        if name == "num_image_tokens" and not hasattr(processor, "vision_feature_select_strategy"):
            continue  # its tokens are not patches
        if not getattr(processor, name):  # absent, or a default for the lack of it
            setattr(processor, name, expected)
        _same(name, getattr(processor, name), expected)
    images = processor.image_processor
    _same("image size", _side(images), side)
    grids = [
        [list(grid) for grid in getattr(each, "image_grid_pinpoints", None) or ()]
        for each in (images, config)
    ]
    if all(grids):
        _same("image_grid_pinpoints", *grids)
    rows = config.text_config.vocab_size
    tokens = {processor.image_token: config.image_token_id}
    if video := getattr(processor, "video_token", None):
        tokens[video] = getattr(config, "video_token_id", None)
    for token, expected in tokens.items():
        if expected is None:
            continue
        _same(f"id of the token {token}", processor.tokenizer.convert_tokens_to_ids(token), expected)
        if expected >= rows:
            raise PmodError(f"the token {token} has id {expected}, and the model's vocabulary {rows} entries")
    last = max(processor.tokenizer.get_vocab().values(), default=0)
    if last >= 2 * max(rows, len(processor.tokenizer)):  # saving it would take memory for all ids below
        raise PmodError(f"the tokenizer has a token of id {last}, and the model's vocabulary {rows} entries")
    if len(processor.tokenizer) > rows:
        raise PmodError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, and the model's vocabulary {rows} entries",
            "take the tokenizer that came with the model",
        )
    return processor


def _one(side: Any) -> int | None:
    """The side of a square that a config may give twice; None where pictures keep their shape."""
    return side[0] if isinstance(side, (list, tuple)) else side


def _same(what: str, processor: Any, model: Any) -> None:
    if None not in (processor, model) and processor != model:
        raise PmodError(
            f"processor and model differ in the {what}: {processor} and {model}",
            "correct config.json, or take the processor that came with the model",
        )


def _side(images: Any) -> int | None:
    """The side of the square pictures that an image processor makes; None where they are no squares."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    if not size or "height" not in size or size["height"] is None or size["height"] != size["width"]:
        return None
    return int(size["height"])
