"""``umbra detach``: write the shadow alone, as a plain transformers model."""

import json
from pathlib import Path

from umbra.cli.parsing import parse
from umbra.cli.terminal import say
from umbra.options import DetachOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra detach", DetachOptions, arguments)
    from umbra.adapters.prompting import open_formatter
    from umbra.deploy.detach import parse_dtype, write_detached
    from umbra.files.manifest import check_apart, of_model, writing
    from umbra.model.loading import load

    dtype, out = parse_dtype(options.dtype), Path(options.out)
    asked = {"command": "detach", "adapter": of_model(options.adapter), "base": options.base, "dtype": options.dtype}
    with writing(out, asked, options.overwrite) as manifest:
        if not manifest.is_complete:
            check_apart(out, adapter=options.adapter, base=options.base)
            model = load(options.adapter, options.base)
            check_apart(out, base=model.base.name_or_path)
            write_detached(model, out, open_formatter(model).tokenizer, overwrite=True, dtype=dtype)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    if options.json:
        say(json.dumps({"path": str(out), "bytes": size}))
    else:
        say(f"{out}: a stock transformers model of {size / 1e6:.1f} MB")
    return 0
