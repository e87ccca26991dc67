"""``umbra convert``: convert an adapter to or from another package."""

import json
from pathlib import Path

from umbra.cli.parsing import parse
from umbra.cli.terminal import say
from umbra.errors import ConfigError
from umbra.options import ConvertOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra convert", ConvertOptions, arguments)
    if not options.to or not options.out:
        raise ConfigError("The format and the folder are missing: --to peft|shadow-peft|umbra --out FOLDER.")
    from umbra.adapters.interop import check_format
    from umbra.deploy.convert import convert
    from umbra.files.manifest import of_model, writing
    from umbra.model.loading import load

    check_format(options.to)
    out = Path(options.out)
    asked = {"command": "convert", "adapter": of_model(options.adapter), "to": options.to, "shadow": options.shadow}
    with writing(out, {**asked, "base": options.base}, False) as manifest:
        if not manifest.is_complete:
            convert(load(options.adapter, options.base, shadow=options.shadow), out, options.to, is_resumed=True)
    files = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    say(json.dumps({"path": str(out), "files": files}) if options.json else f"{out}: {', '.join(files)}")
    return 0
