"""The ``umbra`` command: one verb a module, imported when it runs, so that ``--help`` is instant."""

import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec

from umbra.cli.terminal import (
    BROKEN_PIPE,
    abandon_output,
    isolate,
    message_of,
    place_of,
    plain_streams,
)
from umbra.errors import ConfigError, one_line, unknown_key

VERBS = {
    "Train": {
        "train": "train a shadow: umbra train config.yaml [--field value …]",
        "pretrain": "pretrain a shadow alone: umbra pretrain config.yaml [--field value …]",
    },
    "Use": {
        "eval": "score base, attached and detached on a held-out set",
        "predict": "predict a label or an answer for every line of a JSON Lines file or of standard input",
        "generate": "answer a prompt, streaming",
        "inspect": "explain an adapter folder",
    },
    "Ship": {
        "detach": "write the shadow alone, as a plain transformers model",
        "export": "write the shadow alone for transformers, onnxruntime or llama.cpp, compared with PyTorch",
        "convert": "convert an adapter to or from PEFT and shadow-peft",
    },
    "Measure": {
        "study": "compare methods over tasks and seeds: umbra study study.yaml",
        "report": "write the report of a study again",
        "bench": "measure time and memory beside LoRA, DoRA and the published Shadows",
        "lm_eval": "run lm-eval with --model umbra: umbra lm_eval run --model umbra --model_args adapter=…",
    },
}
OF_THE_LAB = ("study", "report", "bench")
FORMER = {"evaluate": "study"}  # former verbs, which still work for one release
PATIENCE = 20  # seconds for which other ranks leave an error to rank 0, whose end makes the launcher end them all


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. See docs/reference/errors.md.

    Args:
        arguments: the command line; by default this process's.

    Returns:
        0 on success; 1 if single runs of a comparison failed; 2 with one line on standard error for an error that the user
        can correct; 70 likewise for an internal error; 130 when interrupted; 141 if standard output was closed.
    """
    if arguments is None:
        isolate()
        arguments = sys.argv[1:]
    with plain_streams():
        try:
            try:
                return _dispatch(arguments)
            finally:  # argparse ends the process after its help
                sys.stdout.flush()
        except BrokenPipeError:
            abandon_output()
            return BROKEN_PIPE
        except KeyboardInterrupt:
            print("umbra: interrupted", file=sys.stderr)
            return 130
        except Exception as error:  # the one place where every error becomes a line and an exit code
            return _fail(error)


def _fail(error: Exception) -> int:
    """Print the error in one line and return the exit code."""
    if os.environ.get("UMBRA_TRACEBACK"):
        raise error
    from umbra.options import is_main_process

    if not is_main_process():
        time.sleep(PATIENCE)
    text, code = message_of(error), 2
    if text is None:
        kind, code = type(error).__name__, 70
        text = one_line(
            f"unexpected {kind} at {place_of(error)}: {error!s:.300}. Set UMBRA_TRACEBACK=1 for the traceback, and report it"
        )
    print(f"umbra: error: {text}", file=sys.stderr)
    abandon_output()
    return code


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(help_text())
        return 0
    if verb == "--version":
        from umbra import __version__

        print(f"umbra {__version__}")
        return 0
    if verb in FORMER:
        print(f"umbra: {verb} is now {FORMER[verb]}: umbra {FORMER[verb]} …", file=sys.stderr)
        verb = FORMER[verb]
    verbs = available_verbs()
    if verb in OF_THE_LAB and verb not in verbs:
        raise ConfigError(f"umbra {verb} needs umbra.lab, which this installation lacks: install all of Umbra.")
    if verb not in verbs:
        raise unknown_key(verb, verbs, "umbra", "command")
    return import_module(f"umbra.cli.{verb}").run(arguments[1:])


def help_text() -> str:
    """Return the help of ``umbra`` itself: the verbs of this installation by group."""
    lines = [
        "usage: umbra VERB …",
        "",
        "A frozen language model and its detachable shadow. umbra VERB --help lists the options of a verb.",
        "",
        "options:",
        "  -h, --help  show this help message and exit",
        "  --version   print the version",
    ]
    verbs = available_verbs()
    for title, group in VERBS.items():
        lines += ["", f"{title}:", *(f"    {verb:<12}{text}" for verb, text in group.items() if verb in verbs)]
    return "\n".join(lines)


def available_verbs() -> list[str]:
    """Return the verbs of this installation; it may come without `umbra.lab`."""
    has_lab = find_spec("umbra.lab") is not None
    return [verb for group in VERBS.values() for verb in group if has_lab or verb not in OF_THE_LAB]
