import json
import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import lessons
import small_llava
import train
from pmod_cli.demo import data, world
from pmod_cli.demo.job import BASELINE as SHIPPED


@pytest.fixture(scope="module")
def processor():
    return small_llava.build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return small_llava.build_model(processor).eval()


def turn(role, text, image=False):
    content = [{"type": "image"}] if image else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def test_chat_template_is_vicuna_style(processor):
    messages = [
        turn("user", "What colour is the circle?", image=True),
        turn("assistant", "red"),
        turn("user", "Where is it?"),
    ]
    first = "USER: <image>\nWhat colour is the circle? ASSISTANT:"
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == first
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        f"{first} red</s>USER: Where is it? ASSISTANT:"
    )


def test_tokens(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    assert processor.image_token_id == 4
    assert tokenizer.padding_side == "left"
    for word in (*world.COLOURS, *world.SHAPES, *world.PLACES, "one", "two", "yes", "no"):
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    for text in ("Was zeigt das Bild? Größe 12,5 €", "猫はどこ", "tabs\tand\nlines"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_geometry(processor, model):
    image = world.render(world.draw_scene(random.Random(0), "train"))
    inputs = processor(images=[image], text=["USER: <image>\nWhat?"], return_tensors="pt")
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert tokens == small_llava.VISION_TOKENS >= 100
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.text_config.vocab_size == len(processor.tokenizer)


def test_questions_packed_apart_are_as_asked_alone(processor, model):
    scene, questions = lessons.draw_conversation(random.Random(0))
    packed = lessons.pack(processor, [(scene, questions)], apart=True)
    labels = packed.pop("labels")[0]
    with torch.inference_mode():
        together = model(**packed).logits[0]
        ends = (labels == processor.tokenizer.eos_token_id).nonzero().flatten().tolist()
        for question, end in zip(questions, ends, strict=True):
            messages = [turn("user", question.text, image=True), turn("assistant", question.answer)]
            text = processor.apply_chat_template(messages)
            inputs = processor(images=[world.render(scene)], text=[text], return_tensors="pt")
            alone = model(**inputs).logits[0]
            torch.testing.assert_close(together[end - 1 : end + 1], alone[-2:], atol=1e-4, rtol=1e-4)


def test_a_packed_conversation_is_the_chat_template(processor):
    scene, questions = lessons.draw_conversation(random.Random(1))
    packed = lessons.pack(processor, [(scene, questions)], apart=False)
    messages = [
        message
        for index, question in enumerate(questions)
        for message in (turn("user", question.text, image=index == 0), turn("assistant", question.answer))
    ]
    text = processor.apply_chat_template(messages)
    inputs = processor(images=[world.render(scene)], text=[text], return_tensors="pt")
    assert packed["input_ids"].tolist() == inputs["input_ids"].tolist()
    torch.testing.assert_close(packed["pixel_values"], inputs["pixel_values"])
    answered = packed["labels"][0][packed["labels"][0] != lessons.IGNORED]
    expected = "".join(f" {question.answer}</s>" for question in questions)
    assert processor.tokenizer.decode(answered) == expected


def test_a_short_training_run_repeats_itself(tmp_path):
    seen = []
    summary = train.train_baseline(
        tmp_path / "a", steps=3, progress=lambda done, total, now: seen.append((done, total, *sorted(now)))
    )
    again = train.train_baseline(tmp_path / "b", steps=3)
    assert seen == [(step, 3, "accuracy", "loss") for step in (1, 2, 3)]
    assert summary["log"] == again["log"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert set(summary["heldout"]) == set(summary["shuffled"]) == {*world.KINDS, "overall"}
    json.dumps(summary)
    with pytest.raises(ValueError, match="two steps"):
        train.train_baseline(tmp_path / "c", steps=1)


def test_training_learns_to_see(processor):
    model = small_llava.build_model(processor).train()
    scenes = [world.draw_scene(random.Random(seed), "train") for seed in range(8)]
    optimizers = train._optimizers(model)
    losses = []
    for _ in range(12):
        loss, _ = lessons.patch_loss(model, processor, scenes)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_shipped_checkpoint_is_small_and_says_its_dtype():
    weights = SHIPPED / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    with safe_open(weights, "pt") as tensors:
        dtypes = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}
    assert json.loads((SHIPPED / "config.json").read_text())["dtype"] == "bfloat16"


def test_shipped_checkpoint_answers_by_looking():
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    scores = train.evaluate_exact_match(model, processor, data.heldout_samples(24, seed=99))
    guesses = train.evaluate_exact_match(model, processor, data.heldout_samples(24, seed=99, shuffle=True))
    assert scores["overall"] >= 0.9, scores
    assert guesses["overall"] <= 0.5, guesses
