"""The model card of a converted checkpoint, and what its config says of its origin."""

from __future__ import annotations

import re
from typing import Any

import yaml

from pmod_cli import __version__
from pmod_cli.families import Family
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import Recipe

_CITATION = """\
@article{zhang2024pmod,
  title={p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay},
  author={Zhang, Jun and Meng, Desen and Zhang, Zhengming and Huang, Zhenpeng and Wu, Tao and Wang, Limin},
  journal={arXiv preprint arXiv:2412.04449},
  year={2024}
}"""


def provenance(source: str, revision: str | None, fmt: str, recipe: Recipe | None) -> dict[str, Any]:
    """The ``pmod`` section of ``config.json``; transformers keeps it through fine-tuning.

    Args:
        source: As the user named it.
        revision: Hub commit, or None.
        fmt: Name of the source's format.
        recipe: What it was converted by; None if the source brought its own settings.
    """
    return {
        "version": __version__,
        "source": source,
        "revision": revision,
        "format": fmt,
        "recipe": None
        if recipe is None
        else {"name": recipe.name, "mod": recipe.mod.model_dump(mode="json")},
    }


def model_card(
    family: Family, mod: MoDConfig, origin: dict[str, Any], recipe: Recipe | None, source_card: str | None
) -> str:
    """Contents of ``README.md``.

    Args:
        family: Of the model.
        mod: Its settings.
        origin: What `provenance` gave.
        recipe: The whole recipe, or None.
        source_card: The source's own card, whose licence is taken over; None if it has none.
    """
    source = origin["source"]
    on_hub = origin["revision"] is not None
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["p-mod", "mixture-of-depths", "arxiv:2412.04449"],
    }
    if on_hub:
        header["base_model"] = source
    header |= {key: value for key, value in _front_matter(source_card).items() if key.startswith("license")}
    title = source.rstrip("/").rpartition("/")[2]
    layers = len(mod.retention_ratios)
    where = (
        f"[{source}](https://huggingface.co/{source}) at `{origin['revision']}`" if on_hub else f"`{title}`"
    )
    made_by = "the routers and settings that it came with" if recipe is None else f"recipe `{recipe.name}`"
    settings = mod.to_dict() if recipe is None else recipe.model_dump(mode="json", exclude_none=True)
    return f"""\
---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# p-MoD {title}

A Mixture-of-Depths model (p-MoD, [arXiv 2412.04449](https://arxiv.org/abs/2412.04449)) made of {where} by
`pmod convert` {origin["version"]} with {made_by}: {len(mod.mod_layers)} of {layers} decoder layers process only some of
the vision tokens, {100 * mean_retention(mod.retention_ratios):.1f} % on average over all layers.

```python
import pmod_cli  # registers `{family.model_type}` with transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
```

Routers that were not trained keep tokens spread evenly over the image; `pmod inspect` tells which are, and
`pmod finetune` trains them. `pmod convert --to baseline` gives the dense model back.

## Recipe

```yaml
{yaml.safe_dump(settings, sort_keys=False).strip()}
```

## Citation

```bibtex
{_CITATION}
```
"""


def _front_matter(card: str | None) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card or "", re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}
