"""Every family through every command that takes a model, on tiny checkpoints laid out as on the hub."""

from __future__ import annotations

import json
import random

import pytest
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from pmod_cli.cli import main
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.families import find_family
from tests.common import onevision_models
from tests.common.eval_models import make_model, make_next, make_processor, noise, write_questions
from tests.common.family_models import MAKERS
from tests.common.videos import write_video

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image> {% endfor %}"
    "{% for p in m['content'] if p['type'] == 'video' %}<video> {% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def llava():
    processor = make_processor()
    return make_model(processor), processor


def llava_next():
    processor, config = make_next()
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**config)), processor


def llava_onevision():
    processor = onevision_models.processor()
    processor.tokenizer.eos_token = "</s>"
    return onevision_models.dense_model(), processor


def save(make, folder, layout):
    """A dense checkpoint; ``old``: one JSON file for each part of the processor, as before transformers 5."""
    model, processor = make()
    if make.__module__ == __name__:
        processor.chat_template = TEMPLATE
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if layout == "old":
        whole = json.loads((folder / "processor_config.json").read_text())
        for part, name in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
            if part in whole:
                (folder / f"{name}_config.json").write_text(json.dumps(whole.pop(part)))
        (folder / "processor_config.json").write_text(json.dumps(whole))
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
        if "qwen2" in model.config.model_type:  # the language model's settings among the rest
            config = json.loads((folder / "config.json").read_text())
            config = {**config.pop("text_config"), **config}
            (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(
    scope="module",
    params=[
        *((make, layout) for make in (llava, llava_next, llava_onevision) for layout in ("old", "new")),
        *((make, "old" if name.startswith("qwen2") else "new") for name, make in MAKERS.items()),
    ],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def place(request, tmp_path_factory):
    """A folder with the checkpoint, its p-MoD model, pictures, training data of one and two pictures, and a task."""
    make, layout = request.param
    folder = tmp_path_factory.mktemp("family")
    save(make, folder / "dense", layout)
    assert run("convert", folder / "dense", folder / "pmod") == 0
    (folder / "images").mkdir()
    rng = random.Random(0)
    records = []
    for number in range(4):
        names = [f"{number}-{place}.png" for place in range(1 + number % 2)]
        for name in names:
            noise(rng, 24, 20).save(folder / "images" / name)
        asked = " ".join(f"w{20 + place} <image>" for place in range(len(names)))
        turns = [{"from": "human", "value": f"{asked} w{number + 5}"}, {"from": "gpt", "value": "w6 w7"}]
        records.append({"id": number, "image": names, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    asked = [records[number % 4] | {"id": number} for number in range(24)]
    for number, record in enumerate(asked):
        record["image"] = f"{number}.png"
        noise(rng, 24, 20).save(folder / "images" / record["image"])
        turns = [{"from": "human", "value": f"<image> w{number}"}, {"from": "gpt", "value": "w6"}]
        record["conversations"] = turns
    (folder / "many.json").write_text(json.dumps(asked))
    write_task(
        folder / "task", "family_qa", write_questions(folder / "questions", ["red"] * 4), ["colour", "shape"]
    )
    return folder


SMALL = [
    f"--set=train.{setting}"
    for setting in (
        "max_steps=1",
        "global_batch_size=4",
        "micro_batch_size=4",
        "dtype=float32",
        "gradient_checkpointing=false",
        "num_workers=0",
    )
]
TWINS = ("qwen2_vl", "idefics3")
"""Families that differ little from another's."""

COMMANDS = {
    "inspect": "{pmod}",
    "convert": "{pmod} {back} --to baseline",
    "calibrate": "{dense} --data {many} --images {images} --samples 24 --max-new-tokens 2 --output {calibrated}",
    "data check": "{data} --images {images} --model {pmod}",
    "generate": "{pmod} --image {picture} --image {other} --prompt <image>,<image> --max-new-tokens 2",
    "finetune": "{pmod} --data {data} --images {images} --output {tuned}",
    "eval": "{pmod} --tasks family_qa --include-path {task} --output {results} --max-new-tokens 2",
    "profile": "{pmod} --image {picture} --latency --repeats 1 --new-tokens 2 --device cpu",
    "visualize": "{pmod} --image {picture} --prompt w5 --max-new-tokens 2 --html {page}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(request, place, command, capsys):
    measured = not any(
        name in request.node.callspec.id for name in ("llava-old", "next", "vision-old", *TWINS)
    )
    paths = {
        "dense": place / "dense",
        "pmod": place / "pmod",
        "back": place / "back",
        "many": place / "many.json",
        "calibrated": place / "calibrated",
        "data": place / "data.json",
        "images": place / "images",
        "picture": place / "images" / "0-0.png",
        "other": place / "images" / "1-1.png",
        "tuned": place / "tuned",
        "task": place / "task",
        "results": place / "results",
        "page": place / "page.html",
    }
    arguments = [argument.format(**paths) for argument in COMMANDS[command].split()]
    if command == "profile" and not measured:
        arguments = arguments[: arguments.index("--latency")]
    if command == "calibrate" and not measured:
        pytest.skip("as its twin")
    code = run(*command.split(), *arguments, *(SMALL if command == "finetune" else []), "--json")
    output = capsys.readouterr()
    assert code == 0, output.err
    assert json.loads(output.out)["command"] == command


def test_lora_trains_the_decoder_the_projector_and_the_routers(place):
    pytest.importorskip("peft")
    from pmod_cli.recipe import TrainSettings
    from pmod_cli.training.model import count_parts, load_for_training

    settings = TrainSettings(lora={"r": 2, "alpha": 4}, dtype="float32", gradient_checkpointing=False)
    network, _ = load_for_training(place / "pmod", settings)
    parts = {part["part"]: part for part in count_parts(network)}
    for whole in ("projector", "routers"):
        assert (
            parts[whole]["trained"] >= parts[whole]["frozen"] > 0
        )  # the copy that is trained, and the original
    assert parts["vision tower"]["trained"] == 0
    assert 0 < parts["language model"]["trained"] < parts["language model"]["frozen"]


def test_tasks_are_worded_as_lmms_eval_words_them_for_the_family(place):
    from pmod_cli.evaluation.catalogue import Tasks
    from pmod_cli.evaluation.identity import task_name

    family = json.loads((place / "dense" / "config.json").read_text())["model_type"]
    name = task_name(place / "pmod")
    assert name == (family if family.startswith("qwen") else "pmod")
    assert Tasks(["family_qa"], [place / "task"], name).manager.model_name == name


def test_a_video_is_seen_by_the_families_that_take_one(place, tmp_path, capsys):
    pytest.importorskip("av")
    clip = write_video(tmp_path / "clip.mkv", 6)
    arguments = ["--video", clip, "--frames", 4, "--prompt", "w5 <video> w6", "--max-new-tokens", 2, "--json"]
    code = run("generate", place / "pmod", *arguments)
    output = capsys.readouterr()
    family = find_family(json.loads((place / "pmod" / "config.json").read_text())["model_type"])
    if not family.videos:
        assert (code, output.out) == (2, "")
        assert "Loading" not in output.err
        assert "takes no videos (llava_onevision, qwen2_vl" in output.err
        return
    assert code == 0, output.err
    result = json.loads(output.out)["result"]
    assert result["video"] == str(clip)
    assert result["prompt_tokens"] > 4
