"""Read a study from its YAML file."""

from dataclasses import replace

from umbra.errors import ConfigError
from umbra.lab.study.checks import check_study
from umbra.lab.study.definition import SearchConfig, Study, StudyConfig
from umbra.lab.study.mappings import check_mapping, name_list
from umbra.lab.study.methods import read_method
from umbra.lab.study.tasks import read_task
from umbra.options.yaml_file import read_yaml


def read_study(file: str) -> Study:
    """Read and check a study.

    Args:
        file: The path of a YAML file.

    Raises:
        ConfigError: the study cannot be run; the message names the place in the file.
    """
    return parse_study(read_yaml(file))


def parse_study(values: object) -> Study:
    """Build and check a study from the values of its file.

    Raises:
        ConfigError: the study cannot be run.
    """
    config = StudyConfig(**check_mapping(StudyConfig, values, "the study"))
    transfer = {str(k): v for k, v in config.transfer.items()}
    config = replace(config, transfer=transfer, forgetting=name_list(config.forgetting, "forgetting"))
    for key, entries in (("tasks", config.tasks), ("methods", config.methods)):
        if not entries:
            raise ConfigError(f"The study has no {key}: see docs/guides/studies.md.")
    for name in map(str, (*config.tasks, *config.methods)):
        if not name.isprintable():
            raise ConfigError(f"The name {name!r} has unprintable characters: remove them.")
    tasks = {str(k): read_task(str(k), v) for k, v in config.tasks.items()}
    methods = {str(k): read_method(str(k), v) for k, v in config.methods.items()}
    search = None if config.search is None else SearchConfig(**check_mapping(SearchConfig, config.search, "search"))
    study = Study(config, tasks, methods, search)
    check_study(study)
    return study
