"""The model card that lies in every adapter folder."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Shadow
    from .model import ShadowModel


def model_card(values: dict[str, Any], model: "ShadowModel", shadow: "Shadow") -> str:
    """Markdown with the hub's front matter, from the content of ``adapter_config.json``."""
    base, config = values["base_model_name_or_path"], values["shadow"]
    parts = "\n".join(f"| {name} | {count:,} |" for name, count in shadow.parts().items())
    pipeline = "text-classification" if values["task_type"] == "SEQ_CLS" else "text-generation"
    return f"""---
base_model: {json.dumps(base or "unknown", ensure_ascii=False)}
library_name: umbra
pipeline_tag: {pipeline}
tags: [umbra, shadow, peft]
---

# Shadow of {base or "an unnamed base"}

A shadow network beside a frozen {type(model.base).__name__}, in dialect `{config["dialect"]}` with injection rank
{config["rank"]} and α = {config["alpha"]}, made by Umbra {values["umbra_version"]}.

| part | parameters |
|---|---:|
{parts}

```python
import umbra

model = umbra.load("this/folder")   # the base is found by its name; or base=...
edge = model.detached()             # the shadow alone, a stock transformers model
```
"""
