"""``umbra lm_eval``: run lm-eval with Umbra's models."""

from umbra.cli.results import check_installed


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code; the arguments are lm-eval's."""
    check_installed("umbra lm_eval", "lm-eval", ("lm_eval",))
    from umbra.evaluation.lm_eval import main
    from umbra.files import hub

    with hub.lookup("lm-eval's data sets"):
        main(arguments)
    return 0
