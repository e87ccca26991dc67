"""Run functions in threads."""

import threading

import torch


def generate(model, ids, **options) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    return model.generate(ids, max_new_tokens=10, do_sample=False, **options)


def in_threads(*works) -> list:
    """Start each function in its thread at the same time, and return their results."""
    results, errors, start = [None] * len(works), [], threading.Barrier(len(works))

    def run(place: int, work) -> None:
        start.wait()
        try:
            results[place] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
