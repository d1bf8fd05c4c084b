"""Tiny LLaVA checkpoints with random weights, pictures of noise, and questions about them."""

from __future__ import annotations

import itertools
import random

import datasets
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
from pmod_cli.families.llava_next import PmodLlavaNextConfig, PmodLlavaNextForConditionalGeneration
from pmod_cli.modeling.settings import MoDConfig

TEMPLATE = (
    "{% for m in messages %}USER: {% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %} {% endfor %}ASSISTANT:"
)


def make_processor(image_size: int = 16, patch_size: int = 4) -> LlavaProcessor:
    """A processor with a byte-level tokenizer: every text can be written and read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<image>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Random weights, large enough that answers differ from picture to picture."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model.eval()


def noise(rng, width=None, height=None):
    """A picture of random pixels, of a random size if none is given."""
    size = (width or rng.randint(8, 40), height or rng.randint(8, 40))
    return Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))


def write_questions(folder, answers, seed=0):
    """A local data set with one question an answer, of two kinds and of very different lengths."""
    rng = random.Random(seed)
    rows = [
        {
            "image": noise(rng),
            "question": f"What {'really ' * rng.randint(0, 20)}is in picture {index}?",
            "answer": answer,
            "kind": ("colour", "shape")[index % 2],
            "question_id": str(index),
        }
        for index, answer in enumerate(answers)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(
        folder / "test.parquet"
    )
    return folder


def save_llava(folder, seed):
    processor = make_processor()
    make_model(processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_pmod(dense, folder, router_scale=2.0):
    """The p-MoD counterpart of a dense checkpoint, its routers random instead of zero."""
    plain = LlavaConfig.from_pretrained(dense).to_dict()
    plain.pop("model_type")
    config = PmodLlavaConfig(**plain, mod=MoDConfig([None, 0.75, 0.5, 0.25]).to_dict())
    model = PmodLlavaForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(
        LlavaForConditionalGeneration.from_pretrained(dense).state_dict(), strict=False
    )
    assert all("router" in name for name in missing)
    assert not unexpected
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if "router" in name:
            tensor.data.normal_(std=router_scale, generator=generator)
    model.generation_config = GenerationConfig.from_pretrained(dense)
    model.save_pretrained(folder)
    LlavaProcessor.from_pretrained(dense).save_pretrained(folder)
    return folder


def make_next():
    """Processor and config, as keywords, of a LLaVA-NeXT: a picture becomes one to five tiles, by its shape."""
    grids = [[16, 32], [32, 16], [32, 32]]
    base = make_processor()
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grids
    )
    processor = LlavaNextProcessor(
        images,
        base.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = make_model(base).config.to_dict() | {"image_grid_pinpoints": grids}
    return processor, {
        key: value for key, value in config.items() if key not in ("model_type", "image_seq_length")
    }


def save_next(folder):
    """A p-MoD LLaVA-NeXT with random weights."""
    processor, config = make_next()
    mod = MoDConfig([None, 0.75, 0.5, 0.25]).to_dict()
    config = PmodLlavaNextConfig(**config, mod=mod)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PmodLlavaNextForConditionalGeneration(config)
        for name, tensor in model.named_parameters():
            if "router" in name:
                tensor.data.normal_(std=2.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_parrot(folder, answer="Yes"):
    """A checkpoint that always says the same, whose letters must all differ: each token's embedding names the next."""
    processor = make_processor()
    model = make_model(processor)
    encode = processor.tokenizer.encode
    chain = [*encode(":", add_special_tokens=False), *encode(answer, add_special_tokens=False), 2]
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) and "language" in name:
                weight.zero_()  # nothing but the last token's own embedding reaches the head
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        head.zero_()
        for token, following in itertools.pairwise(chain):
            head[following] = torch.nn.functional.normalize(embeddings[token], dim=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def score_of(result, task):
    """The model's score on a requested task."""
    return next(row.model.value for row in result.tasks if row.name == task)
