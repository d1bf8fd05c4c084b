import collections
import json
import random
import subprocess
import sys

import pytest
from PIL import Image

import lessons
from pmod_cli.demo import data, world


def test_the_same_seed_draws_the_same_pictures_and_questions():
    def draw(seed):
        rng = random.Random(seed)
        scenes = [world.draw_scene(rng, "train") for _ in range(20)]
        return [(world.render(scene).tobytes(), world.ask_each(rng, scene)) for scene in scenes]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_pictures_are_of_one_size_and_shapes_lie_inside():
    rng = random.Random(0)
    for _ in range(100):
        scene = world.draw_scene(rng, "train")
        image = world.render(scene)
        assert (image.mode, image.size) == ("RGB", (world.IMAGE_SIZE, world.IMAGE_SIZE))
        for x, y in ((0, 0), (79, 0), (0, 79), (79, 79)):
            assert image.getpixel((x, y)) == (scene.background,) * 3
        for item in scene.items:
            assert item.radius <= min(item.x, item.y)
            assert max(item.x, item.y) + item.radius < world.IMAGE_SIZE


def test_shapes_of_a_scene_differ_in_colour_shape_and_place():
    rng = random.Random(0)
    for _ in range(200):
        first, second = world.draw_scene(rng, "train", 2).items
        assert first.colour != second.colour
        assert first.shape != second.shape
        assert {first.place, second.place} in ({"left", "right"}, {"top", "bottom"})


def test_splits_share_no_scene_whatever_the_seeds():
    drawn = {
        split: {world.draw_scene(rng, split) for rng in map(random.Random, range(3)) for _ in range(300)}
        for split in ("train", "heldout")
    }
    assert not drawn["train"] & drawn["heldout"]
    pictures = {split: {world.render(scene).tobytes() for scene in scenes} for split, scenes in drawn.items()}
    assert not pictures["train"] & pictures["heldout"]


@pytest.mark.parametrize("kind", world.KINDS)
def test_answers_are_near_uniform_given_the_question(kind):
    rng = random.Random(0)
    answers = collections.defaultdict(collections.Counter)
    for _ in range(20_000):
        question = world.ask(rng, world.draw_scene(rng, "train"), kind)
        form = "Is there ...?" if kind == "exists" else question.text
        answers[form][question.answer] += 1
    for form, counts in answers.items():
        total, share = sum(counts.values()), 1 / len(counts)
        assert total < 1000 or max(counts.values()) / total < share * 1.12 + 0.02, (form, counts)
    assert {len(counts) for counts in answers.values()} <= {2, 4, 6}


def test_answers_are_true():
    item = world.Item("circle", "red", "left", 19, 40, 14, 0)
    other = world.Item("cross", "blue", "right", 61, 40, 14, 0)
    scene = world.Scene((item, other), 240)
    truths = {
        "What colour is the shape on the left?": "red",
        "What colour is the cross?": "blue",
        "What shape is on the right?": "cross",
        "What shape is red?": "circle",
        "Where is the circle?": "left",
        "Where is the blue shape?": "right",
        "How many shapes are there?": "two",
        "Is there a red circle?": "yes",
        "Is there a red cross?": "no",
        "Is there a blue circle?": "no",
    }
    rng = random.Random(0)
    seen = {q.text: q.answer for _ in range(500) for q in world.ask_each(rng, scene)}
    assert truths.items() <= seen.items()
    lists = {lessons.list_question(rng, scene).answer for _ in range(2000)}
    assert len(lists) == 2 * 6 * 6
    assert {"red circle left, blue cross right", "right cross blue, left red circle"} <= lists


def test_an_unknown_kind_is_named():
    scene = world.draw_scene(random.Random(0), "train")
    with pytest.raises(ValueError, match=r"'size'.*colour"):
        world.ask(random.Random(0), scene, "size")


def test_training_data_is_in_llava_format(tmp_path):
    json_path, images = data.write_training_data(tmp_path / "train", 12, seed=5)
    records = json.loads(json_path.read_text())
    assert len(records) == len({record["id"] for record in records}) == 12
    for record in records:
        with Image.open(images / record["image"]) as image:
            assert image.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(world.KINDS)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
    assert len({record["conversations"][0]["value"].split()[1] for record in records}) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    before = json_path.read_bytes()
    data.write_training_data(tmp_path / "train", 12, seed=5)
    assert json_path.read_bytes() == before


def test_shuffled_heldout_changes_every_picture_and_nothing_else():
    plain, shuffled = data.heldout_samples(30), data.heldout_samples(30, shuffle=True)
    assert len(plain) == len({sample.question_id for sample in plain}) == 30 * len(world.KINDS)
    for one, other in zip(plain, shuffled, strict=True):
        assert (one.question, one.answer, one.kind) == (other.question, other.answer, other.kind)
        assert one.question_id == other.question_id
        assert one.image.tobytes() != other.image.tobytes()
    with pytest.raises(ValueError, match="two images"):
        data.heldout_samples(1, shuffle=True)


def test_heldout_opens_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = data.write_heldout(tmp_path / "heldout", 6, shuffle=True)
    test = datasets.load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache"))
    expected = data.heldout_samples(6, shuffle=True)
    assert test.column_names == ["image", "question", "answer", "kind", "question_id"]
    assert [row["question_id"] for row in test] == [sample.question_id for sample in expected]
    assert all(row["image"].tobytes() == s.image.tobytes() for row, s in zip(test, expected, strict=True))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    json_path, _ = data.write_training_data(tmp_path / "train", 2)
    with pytest.raises(ValueError, match="two images"):
        data.write_heldout(tmp_path / "train", 1, shuffle=True)
    assert json_path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_importing_world_and_data_leaves_torch_out():
    code = "import sys, pmod_cli.demo.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
