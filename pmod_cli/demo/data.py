from __future__ import annotations
from dataclasses import dataclass
from PIL import Image
import random
from . import world
@dataclass(frozen=True)
class Sample:
    """One held-out question with its picture."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    question_id: str

def heldout_samples(n_images, seed, shuffle=False):
    rng = random.Random(seed)
    scenes=[world.draw_scene(rng,"heldout") for _ in range(n_images)]
    pics=[world.render(s) for s in scenes]
    qs=[world.ask_each(rng,s) for s in scenes]
    off = 1 if shuffle else 0
    out=[]
    for i in range(n_images):
        for j,q in enumerate(qs[i]):
            out.append(Sample(pics[(i+off)%n_images],q.text,q.answer,q.kind,f"{i}-{j}"))
    return out
