"""The model card that lies in every adapter folder. Its last line is a checksum, by which an edited card is known and left."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from umbra.adapters.files import PROMPTING, Values
from umbra.adapters.prompting import describe
from umbra.errors import one_line
from umbra.files import folder
from umbra.options import EMBEDDED, EMBEDDED_HUB_ID

OURS = "library_name: umbra"
SEAL = re.compile(r"<!-- written by Umbra, sha256 ([0-9a-f]{64}) -->\n\Z")


def sealed(text: str) -> str:
    """A card with the line that tells it from an edited one."""
    return f"{text}\n<!-- written by Umbra, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def may_replace(file: Path) -> bool:
    """Whether a README.md may be written: there is none, or a card that nobody has edited."""
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


def _base_model(base: str | None) -> str:
    """The front matter's line of the base, which the hub refuses if it is no id."""
    name = EMBEDDED_HUB_ID if base == EMBEDDED else base or ""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and not Path(name).exists()
    return f"base_model: {name}\n" if is_id else ""


MARKUP = {"<": "&lt;", "`": "\\`", "|": "\\|", "](": "]\\("}  # HTML, code, tables, links


def _shown(value: Any) -> str:
    """Text of others for Markdown: on one line, without markup; of a local folder its name alone."""
    text = str(value)
    text = os.path.basename(text.rstrip("/")) or text if os.path.isabs(text) else text
    return re.sub("|".join(map(re.escape, MARKUP)), lambda match: MARKUP[match[0]], one_line(text))


def model_card(values: Values, base_class: str, parameters: dict[str, int]) -> str:
    """Return the model card of an adapter: Markdown with the hub's front matter.

    Args:
        values: the content of ``adapter_config.json``.
        base_class: the name of the base's class.
        parameters: parameter counts by part of the shadow.
    """
    base, config = values["base_model_name_or_path"], values["shadow"]
    parts = "\n".join(f"| {name} | {count:,} |" for name, count in parameters.items())
    pipeline = "text-classification" if values["task_type"] == "SEQ_CLS" else "text-generation"
    return sealed(f"""---
{_base_model(base)}{OURS}
pipeline_tag: {pipeline}
tags: [umbra, shadow, peft]
---

# Shadow of {_shown(base or "an unnamed base")}

A shadow network beside a frozen {base_class}, in dialect `{config["dialect"]}` with injection rank
{config["rank"]} and α = {config["alpha"]}, made by Umbra {values["umbra_version"]}.
It is asked with {describe(values.get(PROMPTING))}.

| part | parameters |
|---|---:|
{parts}

```python
import umbra

model = umbra.load("this/folder")   # the base is found by its name; or base=...
edge = model.detached()             # the shadow alone, a stock transformers model
```
""")


def pretrained_card(base: str, asked: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown for the folder of a pretrained shadow: what it was asked for, and what each stage measured."""
    stages = {name: found for name, found in metrics.items() if isinstance(found, dict)}
    rows = "\n".join(
        f"| {name} | {m['cross_entropy']:.3f} | {m['divergence']:.3f} | {m['agreement']:.1%} |"
        for name, m in stages.items()
    )
    told = ("data", "prompts", "weights", "stages", "divergence", "temperature", "teacher_top_k", "max_length")
    text = "\n".join(f"- {name}: {_shown(asked[name])}" for name in told if name in asked)
    return sealed(f"""---
{_base_model(base)}pipeline_tag: text-generation
tags: [umbra, shadow, pretrained]
---

# Pretrained shadow for {_shown(base)}

A small language model that was pretrained beside the frozen base, with {metrics["parameters"]:,} trained parameters.

{text}

On held-out text, in nats a token; divergence is KL(base ‖ shadow), agreement how often both say the same next token:

| after | cross-entropy | divergence | agreement |
|---|---:|---:|---:|
{rows}

```python
import umbra

model = umbra.attach(base, umbra.ShadowConfig(shadow="this/folder"))   # or load it as any model of transformers
```
""")
