"""Model cards of adapters and of pretrained shadows.

The last line of a card is a checksum of its text, by which an edited card is recognised and left unchanged.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from umbra.adapters.files import PROMPTING, TASKS, Values
from umbra.adapters.prompting import describe
from umbra.errors import one_line
from umbra.files import folder
from umbra.options import EMBEDDED, EMBEDDED_HUB_ID, EMBEDDED_ORIGIN

LIBRARY = "library_name: umbra"
SEAL = re.compile(r"<!-- written by Umbra, sha256 ([0-9a-f]{64}) -->\n\Z")
MARKUP = {"<": "&lt;", "`": "\\`", "|": "\\|", "](": "]\\("}  # HTML, code, tables, links
# Options of ``umbra pretrain`` that a pretrained shadow's card lists.
SHOWN_OPTIONS = ("data", "prompts", "weights", "stages", "divergence", "temperature", "teacher_top_k", "max_length")


def may_replace(file: Path) -> bool:
    """Return whether a README.md may be written: it does not exist, or is a card that nobody has edited.

    Args:
        file: the README.md.
    """
    try:
        text = folder.read_text(file) if file.exists() else None
    except (OSError, ValueError):
        return False
    if text is None:
        return True
    match = SEAL.search(text)
    if match is None:  # of an earlier version, which wrote no checksum
        return "tags: [umbra, shadow, " in text and text.endswith("```\n")
    return hashlib.sha256(text[: match.start() - 1].encode()).hexdigest() == match[1]


def model_card(values: Values, base_class: str, parameters: dict[str, int]) -> str:
    """Return the model card of an adapter: Markdown with the hub's front matter.

    Args:
        values: the content of ``adapter_config.json``.
        base_class: the name of the base's class.
        parameters: parameter counts by part of the shadow.
    """
    base, config = values["base_model_name_or_path"], values["shadow"]
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in parameters.items())
    pipeline = "text-classification" if values["task_type"] == TASKS[True] else "text-generation"
    return sealed(f"""---
{_base_model(base)}{LIBRARY}
pipeline_tag: {pipeline}
tags: [umbra, shadow, peft]
---

# ShadowPEFT adapter for {escaped(base or "an unnamed base")}

A small shadow network, trained to adapt a frozen {base_class}. It can also run without the base.{_origin(base)}

- Configuration: dialect `{config["dialect"]}`, injection rank {config["rank"]}, α = {config["alpha"]}
- Prompts: {describe(values.get(PROMPTING))}
- Written by Umbra {values["umbra_version"]}

| part | parameters |
|---|---:|
{rows}

```python
import umbra

model = umbra.load("this/folder")   # loads the base by its stored name; or pass base=...
edge = model.detached()             # the shadow alone, as a stock transformers model
```

`umbra.load` opens this folder; `PeftModel.from_pretrained`, `AutoModelForCausalLM.from_pretrained` and `pipeline` do not. They take
what `edge.save_pretrained` writes.
""")


def pretrained_card(base: str, options: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Return the model card of a pretrained shadow: Markdown with the hub's front matter.

    Args:
        base: the name of the base.
        options: the options of ``umbra pretrain``.
        metrics: measurements by stage, and the number of trained ``parameters``.
    """
    stages = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    rows = "\n".join(
        f"| {name} | {m['cross_entropy']:.3f} | {m['divergence']:.3f} | {m['agreement']:.1%} |"
        for name, m in stages.items()
    )
    listed = "\n".join(f"- {name}: {escaped(options[name])}" for name in SHOWN_OPTIONS if name in options)
    return sealed(f"""---
{_base_model(base)}pipeline_tag: text-generation
tags: [umbra, shadow, pretrained]
---

# Pretrained shadow for {escaped(base)}

A small language model with {metrics["parameters"]:,} trained parameters, pretrained to start ShadowPEFT adapters of the base
above.

{listed}

Results on held-out text. Cross-entropy and divergence, KL(base ‖ shadow), are in nats per token; agreement is the share of
positions at which both models predict the same next token.

| after | cross-entropy | divergence | agreement |
|---|---:|---:|---:|
{rows}

```python
import umbra

model = umbra.attach(base, umbra.ShadowConfig(shadow="this/folder"))   # or load it as any transformers model
```
""")


def sealed(text: str) -> str:
    """A card with the line by which an edited one is recognised."""
    return f"{text}\n<!-- written by Umbra, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _origin(base: str | None) -> str:
    """Where the weights of the embedded base come from; they are not those of the hub."""
    return f" {EMBEDDED_ORIGIN}." if base == EMBEDDED else ""


def _base_model(base: str | None) -> str:
    """The front matter's line for the base; empty unless the base is a hub id, since the hub refuses other names."""
    name = EMBEDDED_HUB_ID if base == EMBEDDED else base or ""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and not Path(name).exists()
    return f"base_model: {name}\n" if is_id else ""


def escaped(value: object) -> str:
    """Foreign text for Markdown, on one line and without markup; local folders by their last part alone."""
    text = str(value)
    text = os.path.basename(text.rstrip("/")) or text if os.path.isabs(text) else text
    return re.sub("|".join(map(re.escape, MARKUP)), lambda match: MARKUP[match[0]], one_line(text))
