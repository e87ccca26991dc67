"""The shadow's loss between two logs and over an evaluation."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Trainer

from umbra.method.losses import IGNORED


@dataclass
class ShadowLossLog:
    """Sums of losses, kept on the device until they are logged, so that no step waits for a GPU.

    Args:
        total: sum of the shadow's training losses since the last log.
        since: the step at which that sum began; None if nothing was added to it.
        shadow: the shadow's evaluation losses, one value per example of all ranks, for each batch.
        task: (1, 2) the attached model's evaluation loss times its labels, and the number of labels, for each batch.
    """

    total: Tensor | float = 0.0
    since: int | None = None
    shadow: list[Tensor] = field(default_factory=list)
    task: list[Tensor] = field(default_factory=list)

    def reset(self, total: float = 0.0, since: int | None = None) -> None:
        """Begin the sum of training losses anew, or continue the sum of a checkpoint."""
        self.total, self.since = total, since

    def add(self, loss: Tensor, step: int) -> None:
        """Add the shadow's loss () of a micro-batch, divided by the number of micro-batches in a step."""
        if self.since is None:
            self.since = step
        self.total += loss

    def pop_mean(self, trainer: Trainer) -> float | None:
        """Return the mean over the ranks and over the steps since the last log, and begin anew; None without a step."""
        if self.since is None:
            return None
        of_ranks = trainer.accelerator.gather(torch.as_tensor(self.total))
        assert isinstance(of_ranks, Tensor)
        mean = float(of_ranks.mean()) / (trainer.state.global_step - self.since)
        self.reset()
        return mean

    def clear_evaluation(self) -> None:
        """Forget the losses of an earlier evaluation."""
        self.shadow.clear()
        self.task.clear()

    def add_shadow_evaluation(self, loss: Tensor, trainer: Trainer) -> None:
        """Add the shadow's loss () of an evaluation batch, weighted as the trainer weights the task's."""
        self.shadow.append(_gathered(loss.repeat(trainer.args.eval_batch_size), trainer))

    def add_task_evaluation(self, loss: Tensor, labels: Tensor, trainer: Trainer) -> None:
        """Add the task's loss () of an evaluation batch in which some rows may have no labels (B, T) for the attached model."""
        count = num_labels(labels)
        self.task.append(_gathered(torch.stack([loss.detach().double() * count, count])[None], trainer))

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the losses of an evaluation: the task's, per label, if rows without labels were in it; and the shadow's."""
        metrics: dict[str, float] = {}
        if self.task:
            total, count = torch.cat(self.task).sum(0).tolist()
            metrics[f"{prefix}_loss"] = total / max(count, 1)
        if self.shadow:
            metrics[f"{prefix}_shadow_loss"] = float(torch.cat(self.shadow).mean())
        return metrics


def _gathered(values: Tensor, trainer: Trainer) -> Tensor:
    """Return the values (N, …) of all ranks, without those of padding examples."""
    of_ranks = trainer.gather_function(values)
    assert isinstance(of_ranks, Tensor)
    return of_ranks


def num_labels(labels: Tensor) -> Tensor:
    """Return the number of tokens of labels (B, T) that are learned, as a tensor ()."""
    return (labels[:, 1:] != IGNORED).sum()
